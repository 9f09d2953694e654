"""Losses of samples, and what they say about a model's use of images."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.sample import Sample, Turn
from vlm.evaluation.record_sums import RecordSums
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


def loss_sums(
    sums: Tensor, counts: Tensor, blank_sums: Tensor | None, with_images: Tensor, records: np.ndarray | None = None
) -> dict[str, RecordSums]:
    """Return the loss per supervised token, and the same on blank images: does the model use the image at all?

    All arguments are `(samples,)`: summed losses, numbers of supervised tokens, summed losses with blank images (None
    where no sample has images), whether a sample has images, and the number of its record (None: each is its own).

    Returns:
        `loss`, `blank_loss`, and over the samples with images `image_gain`: the mean of blank minus real loss, each
        the mean over its sample's tokens. See `record_sums` for their intervals.
    """
    own, number = sums.double().numpy(), counts.double().numpy()
    metrics = {"loss": RecordSums.of_samples(own, number, records)}
    if blank_sums is None:
        return metrics
    blank, shown = blank_sums.double().numpy(), with_images.numpy() & (number > 0)
    gains = np.divide(blank - own, number, out=np.zeros_like(own), where=shown)
    return metrics | {
        "blank_loss": RecordSums.of_samples(blank, number, records),
        "image_gain": RecordSums.of_samples(gains, shown, records),
    }


def last_reply_text(sample: Sample) -> str:
    """Return the text of a sample's last reply."""
    return "".join(part for part in sample.turns[-1].content if isinstance(part, str))


def replace_reply(sample: Sample, text: str) -> Sample:
    """Return the sample with another last reply."""
    return replace(sample, turns=(*sample.turns[:-1], Turn("assistant", (text,))))
