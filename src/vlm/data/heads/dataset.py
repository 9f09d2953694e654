"""Samples with what prediction heads learn of them: as a dataset, in batches, and divided by their labels.

Imports siblings only. What labels become is said in `data.labels`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm.data.batching.collator import Collator
from vlm.data.dataset import BlankImageDataset, Contribution, SampleDataset, Skipped
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.heads.labels import HeadLabels, check_values, make_folds, split
from vlm.data.sample import Sample

NO_GROUP = -1
"""The group of rows that have none."""


class HeadDataset(Dataset[Any]):
    """Prompts with their pictures, and with what each head learns of them.

    Args:
        dataset: the samples, with their labels.
        heads: what each head learns.

    Attributes:
        group_indices: `(samples,)`: equal where a ranking compares samples, which it does within a source only; -1 of
            those that have no group.

    Raises:
        ValueError: a head cannot learn a label.
    """

    shown_images = "own"
    """Which pictures the samples show."""

    def __init__(self, dataset: SampleDataset, heads: Sequence[HeadLabels]):
        self.dataset, self.heads = dataset, list(heads)
        self.group_indices = group_indices(dataset)
        self._values = values_per_head(dataset.labels, [head.name for head in heads])
        paths = ", ".join(source.path for source in dataset.sources)
        for head in self.heads:
            check_values(head, self._values[head.name], paths)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        """As of the samples, with `targets` (for each head the numbers of `HeadLabels.target`) and `group`."""
        item = self.model_item(index)
        if isinstance(item, Skipped):
            return item
        targets = {head.name: head.target(self._values[head.name][index]) for head in self.heads}
        return {**item, "targets": targets, "group": int(self.group_indices[index])}

    def model_item(self, index: int) -> dict[str, Any] | Skipped:
        """The sample itself, with its pictures."""
        return self.dataset[index]

    def values(self, name: str) -> list[Any]:
        """What records say to a head, None where that is nothing."""
        return self._values[name]

    def targets(self, name: str) -> np.ndarray:
        """The same as numbers, `(samples, width)`; NaN where it is nothing."""
        head = next(head for head in self.heads if head.name == name)
        rows = [head.target(value) for value in self._values[name]]
        return np.array(rows, dtype=np.float64).reshape(len(rows), head.width)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "HeadDataset":
        """The samples at these places, as a dataset of its own."""
        return type(self)(self.dataset.subset(indices), self.heads)

    def sample(self, index: int) -> Sample:
        """The conversation, as it was read.

        Raises:
            BadSample: its record cannot be used any more.
        """
        return self.dataset.sample(index)

    @property
    def lengths(self) -> np.ndarray:
        """`(samples,)`: tokens, image tokens counted."""
        return self.dataset.lengths

    @property
    def num_images(self) -> np.ndarray:
        """`(samples,)`: pictures and videos."""
        return self.dataset.num_images

    @property
    def has_videos(self) -> bool:
        """Whether the model sees videos in any of them."""
        return self.dataset.has_videos

    @property
    def processor(self) -> Any:
        """The run's processor."""
        return self.dataset.processor

    @property
    def skipped(self) -> list[Skipped]:
        """The records left out before."""
        return self.dataset.skipped

    @property
    def contributions(self) -> list[Contribution]:
        """What each source gives."""
        return self.dataset.contributions


class BlankHeadDataset(HeadDataset):
    """The same samples with every picture of the processor's mean colour: what do heads know without seeing?"""

    shown_images = "blank"

    def model_item(self, index: int) -> dict[str, Any] | Skipped:
        """The sample itself, with blank pictures."""
        return BlankImageDataset(self.dataset)[index]


class HeadCollator:
    """Makes batches of `HeadDataset` samples, with the names that the model's `forward` gives its arguments.

    Args:
        collate: makes batches of ids and images.
        heads: what each head learns.
    """

    def __init__(self, collate: Collator, heads: Sequence[HeadLabels]):
        self.collate, self.heads = collate, list(heads)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Return a batch with `labels` (head -> float32 `(rows, width)`, its targets) and `groups` (int64 `(rows,)`).

        Where a reply is learned, `text_labels` and `prompt_mask` (both int64 `(rows, tokens)`) are there too: the
        reply's ids, -100 elsewhere, and 1 at the tokens before it. A row without a sample, see `Collator`, has NaN for
        targets.
        """
        own = ("targets", "group")
        batch = self.collate([
            one if isinstance(one, Skipped) else {key: value for key, value in one.items() if key not in own}
            for one in samples
        ])  # fmt: skip
        kept = [one for one in samples if not isinstance(one, Skipped)]
        kept = kept or [{"targets": {head.name: head.target(None) for head in self.heads}, "group": NO_GROUP}]
        text_labels = batch.pop("labels")
        batch["labels"] = {
            head.name: torch.tensor([one["targets"][head.name] for one in kept], dtype=torch.float32)
            for head in self.heads
        }
        batch["groups"] = torch.tensor([one["group"] for one in kept], dtype=torch.int64)
        if (text_labels != IGNORE_INDEX).any():
            batch["text_labels"] = text_labels
            batch["prompt_mask"] = prompt_mask(text_labels, batch["attention_mask"])
        return batch


def prompt_mask(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """1 at tokens that are attended to and stand before what is supervised: `(rows, tokens)`, as both arguments."""
    before = (labels != IGNORE_INDEX).cumsum(dim=1) == 0
    return attention_mask * before


def values_per_head(labels: Sequence[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """What records say to each head, None where that is nothing.

    Args:
        labels: of records, see `Sample.label`.
        names: of the heads. Of one head, a label may be its value; of several, it is a mapping with their names.

    Raises:
        ValueError: a label of several heads is no mapping.
    """
    found: dict[str, list[Any]] = {name: [] for name in names}
    for label in labels:
        if label is not None and not isinstance(label, Mapping) and len(names) > 1:
            raise ValueError(
                f"label {label!r:.60}: there are the heads {', '.join(names)}, so a mapping from their names to values "
                "is needed"
            )
        for name in names:
            found[name].append(label.get(name) if isinstance(label, Mapping) else label)
    return found


def group_indices(dataset: SampleDataset) -> np.ndarray:
    """`(samples,)`: a number for each group of each source, -1 for samples that have none."""
    numbers: dict[tuple[int, str], int] = {}
    sources = dataset.places[:, 0].tolist()
    found = [
        NO_GROUP if group is None else numbers.setdefault((source, group), len(numbers))
        for source, group in zip(sources, dataset.groups, strict=True)
    ]
    return np.array(found, dtype=np.int64)


def split_by_label(
    dataset: SampleDataset,
    strata: np.ndarray,
    share: float,
    seed: int,
    names: Sequence[Any] = (),
    key: str = "dataset.eval_split",
) -> tuple[SampleDataset, SampleDataset]:
    """Hold out a share of the records, see `labels.split`: (rest, held out).

    A record that is taken several times is on one side only, and so is a group, if there are any.

    Args:
        dataset: the samples.
        strata: `(samples,)`, see `labels.strata`.
        share: how large a part.
        seed: draws them.
        names: what the strata are called, the labels.
        key: what the share is called in the configuration.

    Raises:
        ValueError: there are too few records or groups, or too few that have one of the labels.
    """
    first, which = _unique_records(dataset)
    groups = _split_groups(dataset, first)
    return _split_datasets(dataset, first, which, split(strata[first], share, seed, groups, names, key))


def fold_by_label(
    dataset: SampleDataset, strata: np.ndarray, number: int, seed: int, names: Sequence[Any] = ()
) -> list[tuple[SampleDataset, SampleDataset]]:
    """Hold out each record once, see `labels.folds`: (rest, held out) of each fold; otherwise as `split_by_label`.

    Raises:
        ValueError: there are fewer groups, or records that have one of the labels, than folds.
    """
    first, which = _unique_records(dataset)
    groups = _split_groups(dataset, first)
    return [
        _split_datasets(dataset, first, which, indices)
        for indices in make_folds(strata[first], number, seed, groups, names)
    ]


def _unique_records(dataset: SampleDataset) -> tuple[np.ndarray, np.ndarray]:
    """Where each record stands first, and for each sample the number of its record among those."""
    _, first, which = np.unique(dataset.places, axis=0, return_index=True, return_inverse=True)
    return first, which.ravel()


def _split_groups(dataset: SampleDataset, first: np.ndarray) -> np.ndarray | None:
    """`(records,)`: numbers of groups, each record without one in a group of its own; None where there are none."""
    numbers = group_indices(dataset)[first]
    if (numbers == NO_GROUP).all():
        return None
    return np.where(numbers == NO_GROUP, numbers.max() + 1 + np.arange(len(numbers)), numbers)


def _split_datasets(
    dataset: SampleDataset, first: np.ndarray, which: np.ndarray, indices: tuple[np.ndarray, np.ndarray]
) -> tuple[SampleDataset, SampleDataset]:
    """The datasets of records on two sides; what was left out is told with the rest."""
    rest = dataset.subset(np.flatnonzero(np.isin(which, indices[0])))
    rest.skipped, rest.contributions = dataset.skipped, dataset.contributions
    return rest, dataset.subset(np.sort(first[indices[1]]))
