"""Metrics of boxes, points and time spans."""

import numpy as np
import pytest

from vlm.data.objects import MarkedObject
from vlm.evaluation.object_metrics import OBJECT_METRICS, ObjectAnswer, compute_object_metrics, overlap, pair_value


def box(*values: float, label: str | None = None, image: int = 0) -> MarkedObject:
    return MarkedObject("box", values, label, image)


def value(name: str, found: list[MarkedObject], true: list[MarkedObject]) -> float:
    return pair_value(OBJECT_METRICS[name], ObjectAnswer(found, true))


def test_overlap_is_intersection_over_union():
    assert overlap(box(0, 0, 10, 10), box(0, 0, 10, 10)) == 1
    assert overlap(box(0, 0, 10, 10), box(5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert overlap(box(0, 0, 10, 10), box(10, 0, 20, 10)) == 0
    assert overlap(box(3, 3, 3, 3), box(3, 3, 3, 3)) == 1, "equal boxes without area"
    assert overlap(MarkedObject("span", (1, 3)), MarkedObject("span", (2, 4))) == pytest.approx(1 / 3)
    assert overlap(MarkedObject("point", (1, 3)), box(0, 0, 9, 9)) == 0


def test_overlap_of_random_boxes_is_that_of_painted_ones():
    chance = np.random.default_rng(0)
    for _ in range(50):
        corners = np.sort(chance.integers(0, 30, (2, 2, 2)), axis=1)  # (boxes, corners, axes)
        first, second = (tuple(map(float, pair.reshape(-1))) for pair in corners)
        painted = np.zeros((2, 30, 30), bool)
        for layer, (x1, y1, x2, y2) in zip(painted, (first, second), strict=True):
            layer[int(y1) : int(y2), int(x1) : int(x2)] = True
        if union := (painted[0] | painted[1]).sum():
            assert overlap(box(*first), box(*second)) == pytest.approx((painted[0] & painted[1]).sum() / union)


def test_objects_are_paired_so_that_the_sum_is_largest():
    true = [box(0, 0, 10, 10), box(8, 0, 18, 10)]
    found = [box(7, 0, 17, 10), box(1, 0, 11, 10)]  # in another order
    assert value("iou", found, true) == pytest.approx(9 / 11)
    assert value("iou", found[:1], true) == pytest.approx(9 / 22), "one is missing"
    assert value("iou", [*found, box(90, 90, 95, 95)], true) == pytest.approx(18 / 33), "one too many"
    assert value("acc@0.5", found, true) == 1
    assert value("iou", [], true) == 0


def test_other_labels_and_images_are_no_pair():
    true = [box(0, 0, 10, 10, label="Cat")]
    assert value("iou", [box(0, 0, 10, 10, label=" cat")], true) == 1
    assert value("iou", [box(0, 0, 10, 10)], true) == 1
    assert value("iou", [box(0, 0, 10, 10, label="dog")], true) == 0
    assert value("iou", [box(0, 0, 10, 10, label="cat", image=1)], true) == 0


def test_points_are_in_boxes():
    true = [box(0, 0, 10, 10)]
    assert value("point_in_box", [MarkedObject("point", (10, 5))], true) == 1
    assert value("point_in_box", [MarkedObject("point", (11, 5))], true) == 0
    assert value("point_in_box", [box(5, 5, 14, 14)], true) == 1, "its middle"
    assert value("point_in_box", [MarkedObject("point", (1, 1))], [MarkedObject("point", (1, 1))]) == 0


def test_means_have_intervals_and_leave_answers_without_truth_out():
    answers = [ObjectAnswer([box(0, 0, 10, 10)], [box(0, 0, 10, 10)]), ObjectAnswer([], [box(0, 0, 1, 1)])] * 5
    answers += [ObjectAnswer([box(0, 0, 10, 10)], [])] * 90
    scores = compute_object_metrics(list(OBJECT_METRICS), answers)
    assert {name: score.value for name, score in scores.items()} == dict.fromkeys(OBJECT_METRICS, 0.5)
    assert scores["iou"].low is not None
    assert scores["iou"].low < 0.5
    assert compute_object_metrics(["iou"], answers, intervals=False)["iou"].low is None
    with pytest.raises(ValueError, match="iou: no record tells where an object is"):
        compute_object_metrics(["iou"], answers[-1:])


def test_objects_that_a_metric_does_not_measure_do_not_count():
    point, span = MarkedObject("point", (1, 1)), MarkedObject("span", (1, 2))
    answers = [
        ObjectAnswer([box(0, 0, 9, 9), point, span], [box(0, 0, 9, 9), point, span]),
        ObjectAnswer([point], [point]),
    ]
    scores = compute_object_metrics(["iou", "acc@0.5"], answers)
    assert [score.value for score in scores.values()] == [1, 1]
    answers = [ObjectAnswer([box(0, 0, 9, 9), span], [box(0, 0, 9, 9), span]), ObjectAnswer([span], [span])]
    assert compute_object_metrics(["point_in_box"], answers)["point_in_box"].value == 1
    with pytest.raises(ValueError, match=r"point_in_box: no record .* `objects` \(box\) that the last reply"):
        compute_object_metrics(["iou", "point_in_box"], answers[1:])
