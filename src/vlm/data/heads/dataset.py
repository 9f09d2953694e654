"""Samples with the targets of prediction heads: as a data set, in batches, and split by their labels.

How a label becomes a target is said in `labels.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm.data.batching.batch import HeadBatch
from vlm.data.batching.collator import Collator
from vlm.data.dataset import BlankImageDataset, SampleDataset
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.heads.labels import HeadLabels, check_values, make_folds, split
from vlm.data.holdout import hold_out, unique_records
from vlm.data.processor import SampleInputs
from vlm.data.skipped import Skipped

NO_GROUP = -1
"""The group of rows that have none."""


class HeadDataset(Dataset[SampleInputs | Skipped]):
    """Prompts with their images, and with the targets of each head.

    Attributes:
        dataset: the samples, with their labels.
        heads: what each head learns.
        group_indices: `(samples,)`: equal where a ranking compares samples, which it does within a source only; -1 for
            samples without a group.

    Raises:
        ValueError: a head cannot learn a label.
    """

    shown_images = "own"
    """Which images the samples show."""

    def __init__(self, dataset: SampleDataset, heads: Sequence[HeadLabels]):
        self.dataset, self.heads = dataset, list(heads)
        self.lengths, self.num_images, self.processor = dataset.lengths, dataset.num_images, dataset.processor
        self.group_indices = group_indices(dataset)
        self._values = values_per_head(dataset.labels, [head.name for head in heads])
        paths = ", ".join(source.shown_path for source in dataset.sources)
        for head in self.heads:
            check_values(head, self._values[head.name], paths)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> SampleInputs | Skipped:
        """The sample, with `targets` (for each head the numbers of `HeadLabels.target`) and `group`."""
        item = self.model_item(index)
        if isinstance(item, Skipped):
            return item
        targets = {head.name: head.target(self._values[head.name][index]) for head in self.heads}
        return {**item, "targets": targets, "group": int(self.group_indices[index])}

    def model_item(self, index: int) -> SampleInputs | Skipped:
        """Return the sample itself, with its images."""
        return self.dataset[index]

    def values(self, name: str) -> list[object]:
        """Return the label of each sample for a head; None if it has none."""
        return self._values[name]

    def targets(self, name: str) -> np.ndarray:
        """Return the target of each sample for a head, `(samples, width)`; NaN if it has no label."""
        head = next(head for head in self.heads if head.name == name)
        rows = [head.target(value) for value in self._values[name]]
        return np.array(rows, dtype=np.float64).reshape(len(rows), head.width)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "HeadDataset":
        """Return the samples at these indices, as a data set of their own."""
        return type(self)(self.dataset.subset(indices), self.heads)


class BlankHeadDataset(HeadDataset):
    """The same samples with every image in the processor's mean colour: what do heads predict without an image?"""

    shown_images = "blank"

    def model_item(self, index: int) -> SampleInputs | Skipped:
        """Return the sample itself, with blank images."""
        return BlankImageDataset(self.dataset)[index]


@dataclass(frozen=True, eq=False)
class HeadCollator:
    """Makes batches of `HeadDataset` samples, with the names that the model's `forward` gives its arguments."""

    collate: Collator
    heads: Sequence[HeadLabels]

    def __call__(self, samples: Sequence[SampleInputs | Skipped]) -> HeadBatch:
        """Return a batch with `labels` (head -> float32 `(rows, width)`, its targets) and `groups` (int64 `(rows,)`).

        Where a reply is trained on, `text_labels` and `prompt_mask` (both int64 `(rows, tokens)`) are there too: the
        reply's ids, -100 elsewhere, and 1 at the tokens before it. A row without a sample, see `Collator`, has NaN for
        targets.
        """
        batch: SampleInputs = {**self.collate([_without_targets(sample) for sample in samples])}
        items = [sample for sample in samples if not isinstance(sample, Skipped)]
        items = items or [{"targets": {head.name: head.target(None) for head in self.heads}, "group": NO_GROUP}]
        text_labels = batch["labels"]
        targets = {head.name: [item["targets"][head.name] for item in items] for head in self.heads}
        batch["labels"] = {name: torch.tensor(rows, dtype=torch.float32) for name, rows in targets.items()}
        batch["groups"] = torch.tensor([item["group"] for item in items], dtype=torch.int64)
        if (text_labels != IGNORE_INDEX).any():
            batch["text_labels"] = text_labels
            batch["prompt_mask"] = prompt_mask(text_labels, batch["attention_mask"])
        return cast(HeadBatch, batch)


def _without_targets(sample: SampleInputs | Skipped) -> SampleInputs | Skipped:
    if isinstance(sample, Skipped):
        return sample
    return {key: value for key, value in sample.items() if key not in ("targets", "group")}


def prompt_mask(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """Return 1 at tokens that are attended to and are before the first supervised one: `(rows, tokens)`, as both."""
    before = (labels != IGNORE_INDEX).cumsum(dim=1) == 0
    return attention_mask * before


def values_per_head(labels: Sequence[object], names: Sequence[str]) -> dict[str, list[object]]:
    """Return the label of each record for each head; None if it has none.

    With one head, a label may be its value; with several, it maps their names to values.

    Raises:
        ValueError: a label for several heads is no mapping.
    """
    for label in labels:
        if label is not None and not isinstance(label, Mapping) and len(names) > 1:
            raise ValueError(
                f"label {label!r:.60}: a mapping from the names of the heads, {', '.join(names)}, to values is needed"
            )
    return {name: [label.get(name) if isinstance(label, Mapping) else label for label in labels] for name in names}


def group_indices(dataset: SampleDataset) -> np.ndarray:
    """Return the number of each sample's group, `(samples,)`; -1 for samples that have none."""
    numbers: dict[tuple[int, str | None], int] = {}
    keys = zip(dataset.places[:, 0].tolist(), dataset.groups, strict=True)
    indices = [NO_GROUP if key[1] is None else numbers.setdefault(key, len(numbers)) for key in keys]
    return np.array(indices, dtype=np.int64)


def split_by_label(
    dataset: SampleDataset,
    strata: np.ndarray,
    share: float,
    seed: int,
    names: Sequence[object] = (),
    key: str = "dataset.eval_split",
) -> tuple[SampleDataset, SampleDataset]:
    """Hold out a share of the records, see `labels.split`: (rest, held out).

    A record that is taken several times is on one side only, and so is a group. `strata` are of samples: `(samples,)`.

    Raises:
        ValueError: there are too few records or groups, or too few that have one of the labels.
    """
    first, record_indices = unique_records(dataset)
    _, held_out = split(strata[first], share, seed, _split_groups(dataset, first), names, key)
    return hold_out(dataset, first, record_indices, held_out)


def fold_by_label(
    dataset: SampleDataset, strata: np.ndarray, number: int, seed: int, names: Sequence[object] = ()
) -> list[tuple[SampleDataset, SampleDataset]]:
    """Hold out each record once, see `labels.make_folds`: (rest, held out) of each fold; else as `split_by_label`.

    Raises:
        ValueError: there are fewer groups, or records that have one of the labels, than folds.
    """
    first, record_indices = unique_records(dataset)
    folds = make_folds(strata[first], number, seed, _split_groups(dataset, first), names)
    return [hold_out(dataset, first, record_indices, held_out) for _, held_out in folds]


def _split_groups(dataset: SampleDataset, first: np.ndarray) -> np.ndarray | None:
    """Return a group number for each record, a new one if it has none; None if no record has a group."""
    numbers = group_indices(dataset)[first]
    if (numbers == NO_GROUP).all():
        return None
    return np.where(numbers == NO_GROUP, numbers.max() + 1 + np.arange(len(numbers)), numbers)
