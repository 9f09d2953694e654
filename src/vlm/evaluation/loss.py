"""Losses of samples, and what they say about a model's use of images."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.sample import Sample, Turn
from vlm.evaluation.bootstrap import Score
from vlm.models.text_loss import SupervisedScores


def row_losses(losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the number of supervised tokens of each row, two `(B,)` tensors.

    `losses`, `(S,)`, are those at the supervised positions of all rows; `labels` are `(B, T)`.
    """
    rows = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)[0].to(losses.device)
    sums = losses.new_zeros(len(labels)).index_add_(0, rows, losses)
    return sums, torch.bincount(rows, minlength=len(labels)).to(sums.dtype)


@torch.no_grad()
def sample_losses(
    compute_losses: SupervisedScores,
    batches: Iterable[dict[str, Tensor]],
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss and supervised tokens of every sample: two `(samples,)` tensors on the CPU, in order.

    Batches are the model's inputs with labels, on its device; `gather` gathers a tensor from all ranks.
    """
    gathered = []
    for inputs in batches:
        losses = compute_losses(inputs)[0]
        gathered.append([gather(tensor).cpu() for tensor in row_losses(losses, inputs["labels"])])
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
