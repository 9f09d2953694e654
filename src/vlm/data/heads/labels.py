"""Labels of prediction heads: which there are, their targets, and how records are split by them.

A table of texts (CSV) has its numbers as texts: they are numbers to tasks that learn numbers, and equal those of other
files. Imports numpy and scikit-learn only.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

NUMERIC_TASKS = ("regression", "pairwise")
"""The tasks that learn numbers; the others choose among labels."""
KNOWN_BINARY_LABELS = (("0", "1"), ("false", "true"), ("no", "yes"), ("negative", "positive"))
"""Pairs of labels of `binary`, as lower-case text, of which the second is known to be the positive one."""
MAX_TARGET = float(np.finfo(np.float32).max)
"""The largest number that a target may be, since targets are float32."""
MAX_STRATA = 10
"""The most strata that numbers, or sets of labels, are divided into."""
MIN_STRATUM_SIZE = 20
"""The fewest records of such a stratum."""

NUMBER_TEXT = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
"""A number as tables write it; not what Python takes for one besides, such as `nan` and `1_000`."""
TRUTH_TEXTS = {"true": True, "false": False}
"""Truth values as tables write them, in lower case."""

Label = str | bool | int | float
LabelKey = tuple[str, Label]
"""A label's kind and the label; the kind tells True from 1, which Python takes for equal."""


@dataclass(frozen=True)
class HeadLabels:
    """What a head learns.

    Attributes:
        name: the head's name, for messages.
        task: a name of `models.head_tasks.NUM_OUTPUTS_BY_TASK`.
        labels: the labels that it chooses among, in the order of its outputs; none for a task of `NUMERIC_TASKS`.
    """

    name: str
    task: str
    labels: tuple[Label, ...] = ()

    @property
    def width(self) -> int:
        """How many numbers a target has."""
        return len(self.labels) if self.task == "multilabel" else 1

    def target(self, value: object) -> list[float]:
        """Return what the loss compares the head's outputs for a record with: `width` numbers.

        They are the index of the record's label; for `multilabel`, 0 or 1 for each label; for `regression` and
        `pairwise` the value; all NaN if the value is None, as the head does not learn from the record then. A number
        or truth value may be given as the text that it has in a table.

        Raises:
            ValueError: the value is none of the labels, or not of the kind that the task needs.
        """
        if value is None:
            return [float("nan")] * self.width
        if self.task in NUMERIC_TASKS:
            number = _number_from_text(value) if isinstance(value, str) else value
            if not _is_finite(number):
                hint = "; in a table, only an empty cell is a missing label" if isinstance(value, str) else ""
                raise ValueError(f"head {self.name}: {self.task} needs a finite number, got {value!r:.60}{hint}")
            return [float(number)]
        if self.task != "multilabel":
            return [float(self.class_index(value))]
        present = {self.class_index(label) for label in _label_list(self.name, value)}
        return [float(index in present) for index in range(self.width)]

    def class_index(self, label: object) -> int:
        """Return the index of a label; ValueError if it is none of them."""
        for key in (_label_key(label), *_other_label_keys(label)):
            if (index := self._class_indices.get(key)) is not None:
                return index
        allowed = ", ".join(map(repr, self.labels[:20])) + ", …" * (len(self.labels) > 20)
        raise ValueError(f"head {self.name}: {label!r:.60} is not one of its labels, which are {allowed}")

    @cached_property
    def _class_indices(self) -> dict[LabelKey | None, int]:
        return {_label_key(label): index for index, label in enumerate(self.labels)}


def resolve_labels(name: str, task: str, given: Sequence[object] | None, values: Sequence[object]) -> HeadLabels:
    """Return what a head learns: the labels that are given, else those of the training records, sorted.

    `given` is `model.head.labels`; `values` are the labels of the training records, None for a record without one.

    Raises:
        ValueError: there is no label, or one that the task cannot have; the order of labels is unknown; the labels of
            the configuration are not those of the records.
    """
    present = [value for value in values if value is not None]
    if not present:
        raise ValueError(
            f"head {name}: no training record has a label. It is looked for in `label` of each record; "
            "dataset.options.label_key=KEY, of dataset.format=labelled, names another key"
        )
    if task in NUMERIC_TASKS:
        if given is not None:
            raise ValueError(f"head {name}: model.head.labels={list(given)}: {task} learns numbers and has no labels")
        head = HeadLabels(name, task)
    else:
        labels = _labels_from_records(name, task, present) if given is None else _check_same_type(name, given)
        head = HeadLabels(name, task, labels)
        _check_num_labels(head, from_config=given is not None)
    check_values(head, values, "training records")
    if given is not None:
        occurring = {head.class_index(label) for label in _flatten_labels(name, task, present)}
        if absent := [label for index, label in enumerate(head.labels) if index not in occurring]:
            raise ValueError(
                f"head {name}: model.head.labels has {', '.join(map(repr, absent))}, but no "
                "training record has this label"
            )
    return head


def check_values(head: HeadLabels, values: Sequence[object], source: str) -> None:
    """Raise ValueError if a head cannot learn one of the labels of a source; None is no label."""
    wrong: Counter[str] = Counter()
    for value in values:
        try:
            head.target(value)
        except ValueError as error:
            wrong[str(error)] += 1
    if wrong:
        message, number = wrong.most_common(1)[0]
        others = f"; {wrong.total() - number} more with other wrong values" if len(wrong) > 1 else ""
        raise ValueError(f"{source}: {message} ({number} of {len(values)} records{others})")


def label_mean_and_std(values: Iterable[float | None]) -> tuple[float, float]:
    """Return mean and standard deviation of the labels of `regression`; None is left out.

    Raises:
        ValueError: all labels are equal, so that there is nothing to learn.
    """
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(numbers) == 0 or numbers.min() == numbers.max():
        raise ValueError(f"all labels are equal ({numbers[0] if len(numbers) else 'there is none'}): nothing to learn")
    return float(numbers.mean()), float(numbers.std())


def _labels_from_records(name: str, task: str, present: Sequence[object]) -> tuple[Label, ...]:
    """Return the labels of records, sorted; for `binary` the positive one last."""
    values = _merge_kinds(_flatten_labels(name, task, present), as_numbers=task == "ordinal")
    distinct = {_checked_label_key(name, label): label for label in values}
    labels: list[Any] = sorted(_check_same_type(name, distinct.values()))
    numbers = {label: _number_from_text(label) or 0.0 for label in labels if _writes_number(label)}
    if len(numbers) == len(labels):
        labels.sort(key=numbers.__getitem__)
    if task == "ordinal" and isinstance(labels[0], str):
        raise ValueError(
            f"head {name}: the order of the labels {', '.join(map(repr, labels[:10]))} is unknown; "
            "set model.head.labels=[lowest, …, highest]"
        )
    if task == "binary" and len(labels) == 2:
        labels.sort(key=lambda label: str(label).lower())  # as in KNOWN_BINARY_LABELS
        if tuple(str(label).lower() for label in labels) not in KNOWN_BINARY_LABELS:
            raise ValueError(
                f"head {name}: which of {labels[0]!r} and {labels[1]!r} is the positive label is unknown; "
                "set model.head.labels=[negative, positive]"
            )
    return tuple(labels)


def _check_num_labels(head: HeadLabels, *, from_config: bool) -> None:
    """Raise ValueError if a task cannot have so many labels."""
    number, shown = len(head.labels), ", ".join(map(repr, head.labels[:10]))
    fewest, most = {"binary": (2, 2), "multilabel": (1, sys.maxsize)}.get(head.task, (2, sys.maxsize))
    if not fewest <= number <= most:
        needed = f"{'exactly' if most == fewest else 'at least'} {fewest} label{'s' * (fewest > 1)}"
        subject = "model.head.labels has" if from_config else "the training records have"
        raise ValueError(f"head {head.name}: {head.task} needs {needed}, {subject} {number}: {shown or 'none'}")


def _flatten_labels(name: str, task: str, values: Sequence[object]) -> list[object]:
    """Return the labels of all records one after the other, where a record may have several."""
    return [label for value in values for label in _label_list(name, value)] if task == "multilabel" else list(values)


def _label_list(name: str, value: object) -> Sequence[object]:
    """Return the labels of a record that may have several; raise ValueError if they are not a list."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"head {name}: multilabel needs a list of labels, got {value!r:.60}; dataset.format=labelled with "
            "dataset.options.label_separator splits a text"
        )
    return value


def _check_same_type(name: str, labels: Iterable[object]) -> tuple[Label, ...]:
    """Return distinct labels, all text, all numbers or all truth values; as whole numbers, if all are."""
    keys = [_checked_label_key(name, label) for label in labels]
    kinds = sorted({kind for kind, _ in keys})
    if len(kinds) > 1:
        shown = ", ".join(repr(label) for _, label in keys[:10])
        raise ValueError(f"head {name}: its labels are {' and '.join(kinds)}, but one kind is needed: {shown}")
    if repeated := [key[1] for key, number in Counter(keys).items() if number > 1]:
        raise ValueError(f"head {name}: the label {repeated[0]!r} occurs twice")
    values = [value for _, value in keys]
    if kinds != ["numbers"]:
        return tuple(values)
    whole = all(value == int(value) for value in values)
    return tuple(map(int if whole else float, values))


def _merge_kinds(labels: Sequence[object], *, as_numbers: bool) -> list[object]:
    """Return labels of one kind: texts next to numbers or truth values are converted if they write such values.

    With `as_numbers`, texts that are all numbers become numbers.
    """
    texts = {label for label in labels if isinstance(label, str)}
    others = [label for label in labels if not isinstance(label, str)]
    if not texts:
        return list(labels)
    if (as_numbers or (others and all(map(_is_finite, others)))) and all(
        _number_from_text(text) is not None for text in texts
    ):
        return [_number_from_text(label) if isinstance(label, str) else label for label in labels]
    if (
        others
        and all(isinstance(label, bool) for label in others)
        and all(text.lower() in TRUTH_TEXTS for text in texts)
    ):
        return [TRUTH_TEXTS[label.lower()] if isinstance(label, str) else label for label in labels]
    return list(labels)


def _writes_number(label: object) -> bool:
    return isinstance(label, str) and NUMBER_TEXT.fullmatch(label) is not None


def _number_from_text(text: str) -> float | None:
    """Return the number that a text writes; None if it writes none."""
    return float(text) if NUMBER_TEXT.fullmatch(text) else None


def _other_label_keys(label: object) -> list[LabelKey]:
    """Return the keys of labels of another kind that a table writes in the same way."""
    if isinstance(label, bool):
        return [("texts", str(label)), ("texts", str(label).lower()), ("texts", str(label).upper())]
    if isinstance(label, str):
        number, truth = _number_from_text(label), TRUTH_TEXTS.get(label.lower())
        return [
            *([("numbers", number)] if number is not None else []),
            *([("truth values", truth)] if truth is not None else []),
        ]
    return [("texts", str(label))] if _is_finite(label) else []


def _checked_label_key(name: str, label: object) -> LabelKey:
    if (key := _label_key(label)) is None:
        raise ValueError(f"head {name}: a label must be a text, a finite number, true or false, got {label!r:.60}")
    return key


def _label_key(label: object) -> LabelKey | None:
    """Return a label's key; None if it is not a label."""
    if isinstance(label, (str, bool)):
        return ("texts" if isinstance(label, str) else "truth values"), label
    if _is_finite(label):
        return "numbers", label
    return None


def _is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number, and finite as float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_TARGET


# Splitting records


def strata(head: HeadLabels, values: Sequence[object]) -> np.ndarray:
    """Return the stratum of each record, of which both sides of a split get their share.

    Returns:
        `(records,)`, whole numbers. `binary`, `multiclass` and `ordinal`: the label's index. `regression`: the tenth of
        the sorted values that the record is in, or a larger part, so that each has `MIN_STRATUM_SIZE` records.
        `multilabel`: the index of the rarest of its labels that a tenth of the records have, and at least
        `MIN_STRATUM_SIZE`. `pairwise`: 0. A record without a label has the next number.
    """
    targets = np.array([head.target(value) for value in values], dtype=np.float64).reshape(len(values), head.width)
    known = ~np.isnan(targets[:, 0])
    if head.task == "pairwise":
        return np.zeros(len(values), dtype=np.int64)
    if head.task == "multilabel":
        numbers = np.full(len(values), head.width)
        counts = np.nansum(targets, axis=0)
        least = max(MIN_STRATUM_SIZE, len(values) / MAX_STRATA)
        for number in np.argsort(-counts, kind="stable"):  # rarer ones later, over the others
            if counts[number] >= least:
                numbers[targets[:, number] == 1] = number
        return _merge_small_strata(numbers, least)
    if head.task == "regression":
        num_strata = max(min(MAX_STRATA, known.sum() // MIN_STRATUM_SIZE), 1)
        ranks = np.argsort(np.argsort(targets[known, 0], kind="stable"), kind="stable")
        numbers = np.full(len(values), num_strata)
        numbers[known] = ranks * num_strata // max(known.sum(), 1)
        return _merge_small_strata(numbers, MIN_STRATUM_SIZE)
    return np.where(known, targets[:, 0], len(head.labels)).astype(np.int64)


def _merge_small_strata(numbers: np.ndarray, least: float) -> np.ndarray:
    """Return strata of which those with fewer than `least` records are merged into the largest."""
    names, indices, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    if len(names) == 0:
        return numbers
    return np.where(counts >= least, names, names[counts.argmax()])[indices.ravel()]


def split(
    strata: np.ndarray, share: float, seed: int, groups: np.ndarray | None = None, names: Sequence[object] = (),
    key: str = "dataset.eval_split",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Hold out a share of the records, drawn with a seed: the same share of each stratum, see `strata`.

    Records of a group stay together; strata are ignored then, and the share is one of groups. Messages call strata by
    their `names` and the share by its `key` in the configuration.

    Returns:
        The indices of the other records, and of those held out, both in order.

    Raises:
        ValueError: there are too few records or groups, or too few that have one of the labels.
    """
    from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit  # slow to import

    key = f"{key}={share}"
    if not 0 < share < 1:
        raise ValueError(f"{key}: a share between 0 and 1 is needed")
    number = len(strata) if groups is None else len(np.unique(groups))
    held_out = int(np.ceil(share * number))
    left = number - held_out
    if groups is not None:
        if not left:  # a single group leaves none either
            raise ValueError(
                f"{key}: groups are not split, and holding out {held_out} of {number} leaves none for training"
            )
        splitter = GroupShuffleSplit
    else:
        if number < 2:
            raise ValueError(f"{key}: at least two records are needed, got {number}")
        _check_stratum_sizes(strata, 2, names, f"{key}: one for training and one to hold out")
        num_strata = len(np.unique(strata))
        if (smaller := min(held_out, left)) < num_strata:
            raise ValueError(
                f"{key} holds out {held_out} of {number} records and leaves {left}: {smaller} cannot have one record "
                f"for each of {num_strata} labels (or parts of the range of numbers)"
            )
        splitter = StratifiedShuffleSplit
    rest, held = next(splitter(1, test_size=held_out, random_state=seed).split(strata, strata, groups))
    return np.sort(rest), np.sort(held)


def make_folds(
    strata: np.ndarray, number: int, seed: int, groups: np.ndarray | None = None, names: Sequence[object] = ()
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Hold out each record once, in folds drawn with a seed, each with the same share of each stratum, see `strata`.

    Records of a group stay together; strata are ignored then. Messages call strata by their `names`.

    Returns:
        For each fold the indices of the other records, and of those held out, both in order.

    Raises:
        ValueError: there are fewer than two folds, or fewer groups, or records that have one of the labels, than folds.
    """
    from sklearn.model_selection import GroupKFold, StratifiedKFold  # slow to import

    if number < 2:
        raise ValueError(f"at least 2 folds are needed, got {number}")
    if groups is not None:
        if (num_groups := len(np.unique(groups))) < number:
            raise ValueError(
                f"{number} folds: at least as many groups are needed, got {num_groups}; groups are not split"
            )
        splitter = GroupKFold
    else:
        if len(strata) < number:
            raise ValueError(f"{number} folds: at least as many records are needed, got {len(strata)}")
        _check_stratum_sizes(strata, number, names, f"{number} folds: one for each")
        splitter = StratifiedKFold
    parts = splitter(number, shuffle=True, random_state=seed).split(strata, strata, groups)
    return [(np.sort(rest), np.sort(held)) for rest, held in parts]


def _check_stratum_sizes(strata: np.ndarray, least: int, names: Sequence[object], why: str) -> None:
    """Raise ValueError if a stratum has fewer than `least` records."""
    numbers, counts = np.unique(strata, return_counts=True)
    if counts.min() < least:
        number = int(numbers[counts.argmin()])
        name = repr(names[number]) if number < len(names) else f"number {number}"
        raise ValueError(
            f"{why}, so at least {least} records of each label are needed; {name} has {counts.min()}; "
            "leave out the records of rarer labels, or add some"
        )
