"""Two runs or more next to each other: what differs in their configurations, metrics and answers.

If two runs were evaluated on the same records, the difference of a metric is paired: by record for evaluations during
training and for `vlm eval`, by resample for heads. Otherwise the interval comes from the recorded intervals
of both runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import ascii_uppercase

import numpy as np

from vlm.config.short_names import show_value
from vlm.evaluation.bootstrap import Score
from vlm.evaluation.paired import paired_difference, units_of
from vlm.evaluation.text_metrics import METRICS, UNBOUNDED_METRICS
from vlm.runs.differences import are_comparable, differing_settings
from vlm.runs.evaluated_records import (
    RECORD_SUMS_FILE,
    EvaluatedRecords,
    paired_metric,
    paired_resamples,
    read_evaluated_records,
)
from vlm.runs.evaluations import Evaluation, read_scores
from vlm.runs.files import Folder, JsonObject, list_at, mapping_at, text_at
from vlm.runs.metrics import INTERVAL_SUFFIX
from vlm.runs.outcome import sign_of
from vlm.runs.read import RunDirectory
from vlm.runs.report_outcomes import NO_METRICS
from vlm.runs.samples import Answer

ANSWERS_FILE = "answers.jsonl"
BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40
NEUTRAL_METRICS = frozenset(
    {
        "image_gain",
        "retrieval_chance",
        "pope_yes",
        "chair_objects",
        "reward_chosen",
        "reward_rejected",
        "kl",
    }
)
"""Metrics of which neither more nor less is better in itself, and those of blank images."""
NOT_COMPARABLE = "not comparable"
MAX_WIDTH = 32
"""If the names have more characters in all, tables show letters instead."""


@dataclass(frozen=True)
class MetricRow:
    """A metric of all runs.

    Attributes:
        place: where it was measured: `training`, or the name of an evaluation or a set.
        metric: its name.
        scores: its value in each run with its interval; None if a run does not have it.
        differences: for each run but the first, its value minus the first run's, with its interval; None if either
            lacks it, or they are not comparable.
        paired: for each difference, whether it is of the same records; empty: none is.
        incomparable: for each difference, whether both have the metric, but as another quantity or on other data;
            empty: none does.
        other_weights: for each score, whether it is of weights that the run's model no longer has; empty: none is.
    """

    place: str
    metric: str
    scores: list[Score | None]
    differences: list[Score | None]
    paired: Sequence[bool] = ()
    incomparable: Sequence[bool] = ()
    other_weights: Sequence[bool] = ()

    def is_paired(self, number: int) -> bool:
        """Return whether a difference is of the same records."""
        return bool(self.paired) and self.paired[number]

    def verdict(self, number: int) -> str:
        """Return whether a run is better than the first: `better`, `worse`, `within noise`, or `not comparable`.

        Empty if that is unknown, and for metrics that are neither good nor bad in themselves.
        """
        if self.incomparable and self.incomparable[number]:
            return NOT_COMPARABLE
        difference = self.differences[number]
        if (
            "blank" in self.metric
            or self.metric.removeprefix("eval_") in NEUTRAL_METRICS
            or difference is None
            or difference.value is None
            or difference.low is None
            or difference.high is None
        ):
            return ""
        if difference.low <= 0 <= difference.high:
            return "within noise"
        return "better" if difference.value * sign_of(self.metric) > 0 else "worse"


class RunComparison:
    """Runs that are compared with the first of them.

    Attributes:
        runs: the runs.
        names: the name of each run: its shortest unique path.
        labels: the names, or letters if names would make tables too wide.
    """

    def __init__(self, runs: Sequence[RunDirectory]):
        self.runs = list(runs)
        self.names = short_paths([str(run.path.resolve()) for run in runs])
        is_wide = sum(map(len, self.names)) > MAX_WIDTH and len(self.names) <= len(ascii_uppercase)
        self.labels = list(ascii_uppercase[: len(self.names)]) if is_wide else self.names

    @cached_property
    def settings(self) -> dict[str, list[object]]:
        """Key -> its value in each run, for the settings that differ."""
        return differing_settings(self.runs)

    @cached_property
    def surroundings(self) -> dict[str, list[str]]:
        """What else differs: data by source and fingerprint, versions, the revision of the source."""
        facts = [_surroundings(run) for run in self.runs]
        keys = dict.fromkeys(key for found in facts for key in found)
        rows = {key: [found.get(key, "") for found in facts] for key in keys}
        return {key: row for key, row in rows.items() if len(set(row)) > 1}

    @property
    def has_other_records(self) -> bool:
        """Whether two runs evaluated different records during training."""
        rows = [row for key, row in self.surroundings.items() if key.startswith("eval data")]
        return len({held for held in zip(*rows, strict=True) if any(held)}) > 1

    @cached_property
    def metrics(self) -> list[MetricRow]:
        """Metrics of the last evaluation during training, of `vlm eval`, and of heads."""
        return [*self._training_metrics(), *self._evaluated_metrics(), *self._head_metrics()]

    def _training_metrics(self) -> list[MetricRow]:
        names = dict.fromkeys(
            name
            for run in self.runs
            for name in run.metrics
            if name == "loss" or (name.startswith("eval_") and not name.endswith((INTERVAL_SUFFIX, *NO_METRICS)))
        )
        rows = []
        for name in names:
            scores = [_logged_score(run, name) for run in self.runs]
            if any(scores):
                pairs = [_paired_logged(self.runs[0], other, name) for other in self.runs[1:]]
                row = _make_row("training", name, scores, pairs)
                rows.append(_without_incomparable(row, [are_comparable(self.runs[0], o, name) for o in self.runs[1:]]))
        return rows

    def _evaluated_metrics(self) -> list[MetricRow]:
        found = [{one.name: one for one in run.evaluations} for run in self.runs]
        rows = []
        for name in dict.fromkeys(name for evaluations in found for name in evaluations):
            evaluations = [one.get(name) for one in found]
            answers, sums = list(map(_Answers, evaluations)), list(map(_read_record_sums, evaluations))
            for metric in dict.fromkeys(metric for one in evaluations if one is not None for metric in one.scores):
                scores = [_evaluated_score(one, metric) for one in evaluations]
                pairs = [_paired_answers(answers[0], other, metric) for other in answers[1:]]
                losses = [paired_metric(sums[0], other, metric) for other in sums[1:]]
                pairs = [loss if pair is None else pair for pair, loss in zip(pairs, losses, strict=True)]
                stale = [one is not None and one.is_of_other_weights for one in evaluations]
                row = replace(_make_row(name, metric, scores, pairs), other_weights=stale)
                rows.append(_without_incomparable(row, [not stale[0] and not other for other in stale[1:]]))
        return rows

    def _head_metrics(self) -> list[MetricRow]:
        found = [dict(_head_scores(run.heads)) for run in self.runs]
        rows = []
        for records, head, metric in dict.fromkeys(key for scores in found for key in scores):
            scores = [one.get((records, head, metric)) for one in found]
            values = [None if score is None else score.value for score in scores]
            entries = [mapping_at(run.head_resamples, records, head) for run in self.runs]
            pairs = [
                paired_resamples(entries[0], entry, metric, [values[0], value])
                for entry, value in zip(entries[1:], values[1:], strict=True)
            ]
            rows.append(_make_row(f"{head}, {records}", metric, scores, pairs))
        return rows

    @cached_property
    def samples(self) -> list[tuple[Answer, list[Answer | None]]]:
        """Questions that runs were asked at their last step: the sample, and each run's answer to it."""
        last = [run.samples[max(run.samples)] if run.samples else [] for run in self.runs]
        by_question = [{(one.question, one.reference): one for one in answers} for answers in last]
        asked = dict.fromkeys(key for answers in by_question for key in answers)
        common = [key for key in asked if sum(key in answers for answers in by_question) > 1]
        rows = [[answers.get(key) for answers in by_question] for key in common]
        return [(next(one for one in row if one is not None), row) for row in rows]


def _surroundings(run: RunDirectory) -> dict[str, str]:
    facts = {}
    for role in run.data:
        for source in list_at(run.data, role, "sources"):
            name = f"{role} data: {text_at(source, 'source')}"
            facts[name] = f"{text_at(source, 'samples')} samples, {text_at(source, 'fingerprint')[:12]}"
    versions = run.versions
    packages = {
        name: show_value(found) for name, found in mapping_at(versions, "packages").items() if found is not None
    }
    others = {name: text_at(versions, name) for name in ("python", "world_size")}
    others["git"] = text_at(versions, "git")[:12]
    devices = ", ".join(map(str, list_at(versions, "devices")))
    return facts | packages | others | {"devices": devices}


def _make_row(place: str, metric: str, scores: list[Score | None], pairs: Sequence[Score | None]) -> MetricRow:
    """Return a metric of all runs, with those differences paired that can be."""
    differences = _differences(scores)
    pairs = pairs or [None] * len(differences)
    chosen = [other if pair is None else pair for pair, other in zip(pairs, differences, strict=True)]
    return MetricRow(place, metric, scores, chosen, [pair is not None for pair in pairs])


def _without_incomparable(row: MetricRow, comparable: Sequence[bool]) -> MetricRow:
    """Return a row without the differences from runs that `comparable` excludes."""
    differences = [one if kept else None for one, kept in zip(row.differences, comparable, strict=True)]
    has_both = [row.scores[0] is not None and score is not None for score in row.scores[1:]]
    incomparable = [both and not kept for both, kept in zip(has_both, comparable, strict=True)]
    paired = [pair and kept for pair, kept in zip(row.paired, comparable, strict=True)]
    return replace(row, differences=differences, paired=paired, incomparable=incomparable)


def _paired_logged(first: RunDirectory, other: RunDirectory, name: str) -> Score | None:
    """Return the difference of a metric's last values on the same records; None if they cannot be paired."""
    columns = first.metrics.get(name), other.metrics.get(name)
    if name == "loss" or columns[0] is None or columns[1] is None or not columns[0].steps or not columns[1].steps:
        return None
    steps = columns[0].steps[-1], columns[1].steps[-1]
    return paired_metric(first.records_at(steps[0]), other.records_at(steps[1]), name)


def _logged_score(run: RunDirectory, name: str) -> Score | None:
    value, width = run.metrics.last(name), run.metrics.last_half_width(name)
    if value is None:
        return None
    return Score(value) if width is None else Score(value, value - width, value + width)


def _evaluated_score(evaluation: Evaluation | None, metric: str) -> Score | None:
    found = None if evaluation is None else evaluation.scores.get(metric)
    return None if found is None or found[0] is None else Score(*found)


def _head_scores(heads: JsonObject) -> Iterator[tuple[tuple[str, str, str], Score]]:
    for records in heads:
        for head in mapping_at(heads, records):
            for metric, score in read_scores({"metrics": mapping_at(heads, records, head, "scores")}).items():
                yield (records, head, metric), Score(*score)


def _differences(scores: Sequence[Score | None]) -> list[Score | None]:
    """Return each run's value minus the first one's, with an interval that treats both as independent."""
    first = scores[0]
    return [None if first is None or other is None else _difference(first, other) for other in scores[1:]]


def _difference(first: Score, other: Score) -> Score | None:
    if first.value is None or other.value is None:
        return None
    difference = other.value - first.value
    ends = (first.low, first.high, other.low, other.high)
    if None in ends:
        return Score(difference)
    low = math.hypot(other.value - (other.low or 0.0), (first.high or 0.0) - first.value)
    high = math.hypot((other.high or 0.0) - other.value, first.value - (first.low or 0.0))
    return Score(difference, difference - low, difference + high)


class _Answers:
    """A run's answers to the records of one evaluation, with the metrics of each.

    Attributes:
        rows: record -> its row of `answers.jsonl`; empty without an evaluation.
    """

    def __init__(self, evaluation: Evaluation | None):
        self.rows = {} if evaluation is None else _read_answers(evaluation)
        self._values: dict[str, np.ndarray | None] = {}

    def values(self, metric: str) -> np.ndarray | None:
        """Return a metric of each answer, `(records,)`; None if it has no value for each."""
        if metric not in self._values:
            self._values[metric] = self._measure(metric)
        return self._values[metric]

    def _measure(self, metric: str) -> np.ndarray | None:
        if metric not in METRICS:
            return None
        rows = list(self.rows.values())
        references = [[str(text) for text in list_at(row, "references")] or [text_at(row, "reference")] for row in rows]
        try:
            values = np.asarray(METRICS[metric]([text_at(row, "answer") for row in rows], references), np.float64)
        except (ImportError, ValueError):  # its library is not installed
            return None
        return values if values.shape == (len(rows),) else None


def _paired_answers(first: _Answers, other: _Answers, metric: str) -> Score | None:
    """Return a metric of `other` minus that of `first`; None if they did not answer the same records."""
    if not first.rows or tuple(first.rows) != tuple(other.rows):
        return None
    before, after = first.values(metric), other.values(metric)
    if before is None or after is None:
        return None
    units = units_of([text_at(row, "image_path") for row in first.rows.values()])
    return paired_difference(before, after, units, is_bounded=metric not in UNBOUNDED_METRICS)


def _read_record_sums(evaluation: Evaluation | None) -> EvaluatedRecords | None:
    """Return what `vlm eval` found of the loss of each record; None if that was not kept."""
    return None if evaluation is None else read_evaluated_records(Folder(evaluation.folder), RECORD_SUMS_FILE)


def _read_answers(evaluation: Evaluation) -> dict[tuple[str, ...], JsonObject]:
    """Return record -> its row, of the records that were answered and have references."""
    rows = Folder(evaluation.folder).json_lines(ANSWERS_FILE)
    asked = [row for row in rows if not text_at(row, "error") and (row.get("references") or row.get("reference"))]
    return {(text_at(row, "source"), text_at(row, "prompt"), str(place)): row for place, row in enumerate(asked)}


def short_paths(paths: Sequence[str]) -> list[str]:
    """Return the shortest unique ending of each path."""
    split = [path.strip("/").split("/") for path in paths]
    for number in range(1, max(map(len, split), default=1) + 1):
        names = ["/".join(words[-number:]) for words in split]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def sparkline(points: Sequence[tuple[float, float]], bounds: tuple[float, float, float, float]) -> str:
    """Return a curve as a line of blocks, on axes shared with other curves.

    Args:
        points: steps and values.
        bounds: the first and the last step, and the lowest and the highest value, of all curves.
    """
    first, last, low, high = bounds
    cells: list[list[float]] = [[] for _ in range(SPARK_WIDTH)]
    for x, y in points:
        place = 0 if last == first else round((SPARK_WIDTH - 1) * (x - first) / (last - first))
        cells[place].append(y)
    line, level = "", " "
    end = max((place for place, values in enumerate(cells) if values), default=-1)
    for place, values in enumerate(cells):
        if values:
            share = 0.5 if high == low else (sum(values) / len(values) - low) / (high - low)
            level = BARS[round(share * (len(BARS) - 1))]
        line += level if place <= end else " "
    return line
