"""Samples into batches: padding, a dummy image where a batch has none, and a list of the records left out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vlm.data.dataset import Skipped
from vlm.data.encode import IGNORED

SKIPPED = "skipped"
"""The key of a batch under which the records stand that were left out of it; the training loop takes them out."""


class Collator:
    """Pads on the right and lays the images of all rows one after the other.

    Args:
        pad_token_id: id at padded places (their attention is 0, their label -100).
        dummy: ids of one image and its pixels, for a batch without images: every batch then runs the same modules,
            without which ranks would wait for each other, and a connector that trains alone would get no gradient.
            The placeholders are attended by nothing. None: no dummy.
    """

    def __init__(self, pad_token_id: int, dummy: tuple[Sequence[int], Tensor] | None = None):
        self.pad_token_id = pad_token_id
        self.dummy = dummy

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Lay samples out as ids, mask and labels `(rows, tokens)`, and `pixel_values` `(images, 3, h, w)`.

        A record that was left out is no row, and no other stands in for it. Where none is left, one row without a
        supervised token keeps the ranks together.
        """
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        samples = [sample for sample in samples if not isinstance(sample, Skipped)]
        samples = samples or [{"input_ids": [self.pad_token_id], "labels": [IGNORED], "pixel_values": None}]
        pixels = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        rows = [np.array(sample["input_ids"], dtype=np.int64) for sample in samples]
        lengths = [len(row) for row in rows]
        if not pixels and self.dummy is not None:
            shortest = lengths.index(min(lengths))
            rows[shortest] = np.concatenate([rows[shortest], np.array(self.dummy[0], dtype=np.int64)])
            pixels = [self.dummy[1]]
        shape = len(rows), max(map(len, rows))
        input_ids = np.full(shape, self.pad_token_id)
        labels = np.full(shape, IGNORED)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for index, (row, sample, length) in enumerate(zip(rows, samples, lengths, strict=True)):
            input_ids[index, : len(row)] = row
            labels[index, :length] = sample["labels"]
            attention_mask[index, :length] = 1
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if pixels:
            batch["pixel_values"] = _joined(pixels)
        if skipped:
            batch[SKIPPED] = skipped
        return batch


def _joined(pixels: Sequence[Tensor]) -> Tensor:
    """Images one after the other; in a data worker at once in the memory that it shares with its parent."""
    if get_worker_info() is None:
        return torch.cat(list(pixels))
    number = sum(map(len, pixels))
    shared = pixels[0].untyped_storage()._new_shared(pixels[0][0].nbytes * number)
    out = pixels[0].new(shared).view(number, *pixels[0].shape[1:])
    return torch.cat(list(pixels), out=out)
