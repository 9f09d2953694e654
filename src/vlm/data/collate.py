"""Samples into batches: padding, a dummy image where a batch has none, and a list of the records left out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
        rows = [list(sample["input_ids"]) for sample in samples]
        lengths = [len(row) for row in rows]
        pixels = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        if not pixels and self.dummy is not None:
            rows[lengths.index(min(lengths))] += self.dummy[0]
            pixels = [self.dummy[1]]
        longest = max(map(len, rows))
        input_ids = torch.full((len(rows), longest), self.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORED)
        attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, (row, sample, length) in enumerate(zip(rows, samples, lengths, strict=True)):
            input_ids[index, : len(row)] = torch.tensor(row)
            labels[index, :length] = torch.tensor(sample["labels"])
            attention_mask[index, :length] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if pixels:
            batch["pixel_values"] = torch.cat(list(pixels))
        if skipped:
            batch[SKIPPED] = skipped
        return batch
