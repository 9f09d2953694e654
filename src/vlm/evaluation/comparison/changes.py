"""What moved between two models: paired differences of groups of records, with 95% intervals.

Intervals are those of `vlm.evaluation.paired`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm.data.encoding.thinking import without_thinking
from vlm.evaluation.bootstrap import Score
from vlm.evaluation.comparison.measure import Measured
from vlm.evaluation.comparison.records import HELD_OUT, PROBE
from vlm.evaluation.paired import paired_difference, units_of
from vlm.evaluation.probe.grading import Check, grade
from vlm.evaluation.text_metrics import UNBOUNDED_METRICS, get_metric

ALL = "all"
"""The split that has one group: all records of a set."""
LOSS, RIGHT = "loss", "right"
"""Measures besides metrics of answers: the loss of a record's reply, and whether an answer to the probe is right."""

Pair = tuple[Measured, Measured]
"""A record before and after; both could be asked."""


@dataclass(frozen=True)
class Change:
    """A measure of a group of records, before and after.

    Attributes:
        dataset: the set of records, `held-out` or `probe`.
        split: how records are grouped: `all`, `source`, `kind`, or a key of records.
        group: the name of the group.
        measure: a metric of answers, `right`, or `loss`.
        is_blank: whether the images were blank.
        num_records: number of records of which both models have the measure.
        before: its mean before.
        after: its mean after.
        difference: after minus before, with its interval; without one where there are fewer than `MIN_UNITS` units, and
            where all agree in a measure that is no share.
        num_better: number of records that got better.
        num_worse: number of records that got worse.
    """

    dataset: str
    split: str
    group: str
    measure: str
    is_blank: bool
    num_records: int
    before: float
    after: float
    difference: Score
    num_better: int
    num_worse: int

    @property
    def direction(self) -> int:
        """1 where the group clearly got better, -1 where it clearly got worse; 0 where the interval includes 0."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None or low <= 0 <= high:
            return 0
        return int(np.sign(low)) * sign_of(self.measure)


def sign_of(measure: str) -> int:
    """Return 1 for a measure of which more is better, -1 for the loss."""
    return -1 if measure == LOSS else 1


def compute_changes(pairs: Sequence[Pair], metrics: Sequence[str]) -> list[Change]:
    """Return the changes of all groups: each set as a whole, with images and blank ones, then split by split.

    Args:
        pairs: each record before and after.
        metrics: metrics of answers to records of the user's, each a value for every answer.

    Raises:
        ValueError: a metric gives no value for each answer.
    """
    return [
        change
        for dataset in (HELD_OUT, PROBE)
        if (rows := [pair for pair in pairs if pair[0].dataset == dataset])
        for change in _changes_of_set(dataset, rows, [RIGHT] if dataset == PROBE else metrics)
    ]


def _changes_of_set(dataset: str, pairs: Sequence[Pair], metrics: Sequence[str]) -> Iterator[Change]:
    units = units_of([before.media for before, _ in pairs])
    whole = np.arange(len(pairs))
    splits = list(dict.fromkeys(name for before, _ in pairs for name in before.groups))
    for is_blank in (False, True):
        values = paired_values(pairs, metrics, is_blank=is_blank)
        for measure, (before, after) in values.items():
            for split in (ALL, *splits):
                groups = {ALL: whole} if split == ALL else _group(pairs, split)
                if split != ALL and (len(groups) < 2 and split == "source"):
                    continue
                for group, rows in groups.items():
                    change = _change((dataset, split, group, measure, is_blank), before[rows], after[rows], units[rows])
                    if change is not None:
                        yield change


def _group(pairs: Sequence[Pair], split: str) -> dict[str, np.ndarray]:
    """Return the rows of each group of a split, the largest group first."""
    names = [before.groups.get(split) for before, _ in pairs]
    groups = {name: np.array([row for row, other in enumerate(names) if other == name]) for name in names if name}
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _change(
    place: tuple[str, str, str, str, bool], before: np.ndarray, after: np.ndarray, units: np.ndarray
) -> Change | None:
    """Return a change; None where no record has the measure of both models."""
    known = ~(np.isnan(before) | np.isnan(after))
    if not known.any():
        return None
    before, after, units = before[known], after[known], units[known]
    gains = (after - before) * sign_of(place[3])
    is_bounded = place[3] not in (LOSS, *UNBOUNDED_METRICS)
    return Change(
        *place,
        len(before),
        float(before.mean()),
        float(after.mean()),
        paired_difference(before, after, units, is_bounded=is_bounded),
        int((gains > 0).sum()),
        int((gains < 0).sum()),
    )


def paired_values(
    pairs: Sequence[Pair], metrics: Sequence[str], *, is_blank: bool = False
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return measure -> its values before and after, two `(records,)`; NaN where a record does not have it."""
    columns = [list(column) for column in zip(*pairs, strict=True)]
    before, after = (measure_values(column, metrics, is_blank=is_blank) for column in columns)
    return {name: (before[name], after[name]) for name in before}


def measure_values(
    rows: Sequence[Measured], metrics: Sequence[str], *, is_blank: bool = False
) -> Mapping[str, np.ndarray]:
    """Return measure -> its value for each row of one model, `(records,)`; NaN where a row does not have it."""
    answers = [row.blank_answer if is_blank else row.answer for row in rows]
    losses = [row.blank_loss if is_blank else row.loss for row in rows]
    return {name: _metric_values(name, rows, answers) for name in metrics} | {
        LOSS: np.array([np.nan if loss is None else loss for loss in losses], np.float64)
    }


def _metric_values(name: str, rows: Sequence[Measured], answers: Sequence[str | None]) -> np.ndarray:
    values = np.full(len(rows), np.nan)
    if name == RIGHT:
        for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            if row.check is not None and answer is not None:
                values[place] = grade(answer, Check.from_record(row.check))
        return values
    known = [place for place, row in enumerate(rows) if row.references and answers[place] is not None]
    if not known:
        return values
    texts = [without_thinking(str(answers[place])) for place in known]
    computed = np.asarray(get_metric(name)(texts, [rows[place].references for place in known]), np.float64)
    if computed.shape != (len(known),):
        raise ValueError(f"{name}: it has no value for each answer, so records cannot be paired; choose another metric")
    values[known] = computed
    return values
