"""Losses of samples, and what they say about a model's use of images."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.sample import Sample, Turn
from vlm.evaluation.bootstrap import Score


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the number of supervised tokens of each row, two `(B,)` tensors.

    `logits`, `(S, vocabulary)`, are those at the supervised positions of all rows; `labels` are `(B, T)`.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    rows, columns = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    pieces = zip(logits.split(1024), targets[rows, columns].split(1024), strict=True)  # bounds the float32 copy
    losses = torch.cat([F.cross_entropy(piece.float(), target, reduction="none") for piece, target in pieces])
    sums = losses.new_zeros(len(labels)).index_add_(0, rows, losses)
    return sums, torch.bincount(rows, minlength=len(labels)).to(sums.dtype)


def supervised_logits(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[CausalLMOutput, Tensor]:
    """Return the model's output with logits `(S, vocabulary)` at supervised positions, and their targets `(S,)`."""
    targets = F.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]  # (B, T)
    keep = targets != IGNORE_INDEX
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    return model(**rest, logits_to_keep=keep, use_cache=False), targets[keep]


@torch.no_grad()
def sample_losses(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed loss and supervised tokens of every sample: two `(samples,)` tensors on the CPU, in order.

    Batches are the model's inputs with labels, on its device; `gather` gathers a tensor from all ranks.
    """
    gathered = []
    for inputs in batches:
        logits = supervised_logits(model, inputs)[0].logits
        assert logits is not None
        gathered.append([gather(tensor).cpu() for tensor in row_losses(logits, inputs["labels"])])
    sums, counts = zip(*gathered, strict=True)
    return torch.cat(sums), torch.cat(counts)


def loss_scores(sums: Tensor, counts: Tensor, blank_sums: Tensor | None, with_images: Tensor) -> dict[str, Score]:
    """Return the loss per supervised token, and the same on blank images: does the model use the image at all?

    All tensors are `(samples,)`: summed losses, numbers of supervised tokens, summed losses with blank images (None
    where no sample has images), and whether a sample has images.

    Returns:
        `loss`, `blank_loss`, and over the samples with images `image_gain`: the mean of blank minus real loss, each
        the mean over its sample's tokens. Its 95% interval is the normal approximation.
    """
    scores = {"loss": Score((sums.sum() / counts.sum()).item())}
    if blank_sums is None:
        return scores
    gains = ((blank_sums - sums) / counts)[with_images]
    gain = gains.mean().item()
    scores |= {"blank_loss": Score((blank_sums.sum() / counts.sum()).item()), "image_gain": Score(gain)}
    if len(gains) > 1:
        half_width = 1.96 * gains.std().item() / math.sqrt(len(gains))
        scores["image_gain"] = Score(gain, gain - half_width, gain + half_width)
    return scores


def last_reply_text(sample: Sample) -> str:
    """Return the text of a sample's last reply."""
    return "".join(part for part in sample.turns[-1].content if isinstance(part, str))


def replace_reply(sample: Sample, text: str) -> Sample:
    """Return the sample with another last reply."""
    return replace(sample, turns=(*sample.turns[:-1], Turn("assistant", (text,))))
