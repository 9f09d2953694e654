"""Metrics of the boxes, points and time spans in answers. To add one, write a function, add it to `OBJECT_METRICS` and
its name to `vlm.config.choices.OBJECT_METRICS`.

Objects of an answer are paired one to one with true objects, so that the sum of the values of pairs is largest. Objects
of different images, of different kinds, or of different labels (where both have one) are no pair. The value of an
answer is that sum divided by the number of its objects or of the true ones, whichever is larger: an object too many
counts as one that is missing does. Only objects of kinds that a metric measures count (`MEASURED_KINDS`); answers
without true objects of these are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm.data.objects import BOX, POINT, SPAN, MarkedObject
from vlm.evaluation.bootstrap import Score, mean_score

IOU_THRESHOLD = 0.5


@dataclass(frozen=True)
class ObjectAnswer:
    """The objects that an answer tells, and the true ones, in pixels of upright images."""

    found: Sequence[MarkedObject]
    true: Sequence[MarkedObject]


Pairing = Callable[[MarkedObject, MarkedObject], float]
"""The value of a pair of an object of an answer and a true one, from 0 to 1."""


def overlap(found: MarkedObject, true: MarkedObject) -> float:
    """Return the area of the intersection of two boxes, or the length of that of two spans, divided by the union's."""
    if found.kind != true.kind or true.kind not in (BOX, SPAN):
        return 0.0
    half = len(true.values) // 2
    starts, ends = (
        zip(found.values[:half], true.values[:half], strict=True),
        zip(found.values[half:], true.values[half:], strict=True),
    )
    common = np.prod([max(0.0, min(end) - max(start)) for start, end in zip(starts, ends, strict=True)])
    union = _extent(found) + _extent(true) - common
    return float(common / union) if union > 0 else float(found.values == true.values)


def is_overlapping(found: MarkedObject, true: MarkedObject) -> float:
    """Return 1 where `overlap` is at least `IOU_THRESHOLD`, else 0."""
    return float(overlap(found, true) >= IOU_THRESHOLD)


def is_point_inside(found: MarkedObject, true: MarkedObject) -> float:
    """Return 1 where a point, or the middle of a box, is in a true box; else 0."""
    if true.kind != BOX or found.kind not in (BOX, POINT):
        return 0.0
    x1, y1, x2, y2 = found.values * (2 if found.kind == POINT else 1)
    left, top, right, bottom = true.values
    return float(left <= (x1 + x2) / 2 <= right and top <= (y1 + y2) / 2 <= bottom)


OBJECT_METRICS: dict[str, Pairing] = {
    "iou": overlap,
    f"acc@{IOU_THRESHOLD:g}": is_overlapping,
    "point_in_box": is_point_inside,
}
"""Name of a metric -> the value of a pair."""
MEASURED_KINDS = {
    "iou": ((BOX, SPAN), (BOX, SPAN)),
    f"acc@{IOU_THRESHOLD:g}": ((BOX, SPAN), (BOX, SPAN)),
    "point_in_box": ((BOX, POINT), (BOX,)),
}
"""Name of a metric -> the kinds of objects of an answer, and of true ones, that count."""


def compute_object_metrics(
    names: Sequence[str], answers: Sequence[ObjectAnswer], *, intervals: bool = True
) -> dict[str, Score]:
    """Return metrics by name, with 95% intervals unless `intervals` is False.

    Raises:
        ValueError: no answer has true objects that a metric measures.
    """
    check_measurable(names, [answer.true for answer in answers])
    scores = {}
    for name in names:
        measured = (measured_objects(name, answer) for answer in answers)
        values = np.array([pair_value(OBJECT_METRICS[name], answer) for answer in measured if answer.true], np.float64)
        scores[name] = mean_score(values, 1000 if intervals else 0)
    return scores


def check_measurable(names: Sequence[str], true: Sequence[Sequence[MarkedObject]]) -> None:
    """Raise ValueError where no record has true objects that a metric measures; `true` has those of each record."""
    for name in names:
        kinds = MEASURED_KINDS[name][1]
        if not any(marked.kind in kinds for objects in true for marked in objects):
            raise ValueError(
                f"{name}: no record tells where an object is; give records with `objects` ({' or '.join(kinds)}) that "
                "the last reply tells about (docs/coordinates.md)"
            )


def measured_objects(name: str, answer: ObjectAnswer) -> ObjectAnswer:
    """Return an answer with the objects that a metric measures alone."""
    found, true = MEASURED_KINDS[name]
    return ObjectAnswer(
        [marked for marked in answer.found if marked.kind in found],
        [marked for marked in answer.true if marked.kind in true],
    )


def pair_value(value: Pairing, answer: ObjectAnswer) -> float:
    """Return the value of an answer: see the top of this file."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and checks of a run need the names alone

    if not answer.found:
        return 0.0
    pairs = [
        [value(found, true) if may_be_paired(found, true) else 0.0 for found in answer.found] for true in answer.true
    ]
    matrix = np.array(pairs, np.float64)  # (true objects, objects of the answer)
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    return float(matrix[rows, columns].sum() / max(matrix.shape))


def may_be_paired(found: MarkedObject, true: MarkedObject) -> bool:
    """Return whether two objects are of one image or video, and do not have different labels."""
    labels = [marked.label.strip().casefold() for marked in (found, true) if marked.label is not None]
    return found.medium == true.medium and len(set(labels)) < 2


def _extent(marked: MarkedObject) -> float:
    half = len(marked.values) // 2
    sides = (end - start for start, end in zip(marked.values[:half], marked.values[half:], strict=True))
    return float(np.prod(list(sides)))
