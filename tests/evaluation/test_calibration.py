"""Temperatures and thresholds: known ones are found again, and thresholds are the best there are."""

import numpy as np
import pytest
from scipy.special import expit, logit, softmax
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from vlm.evaluation.calibration import THRESHOLD_CRITERIA, Calibration, calibrate, validate_outputs, validate_targets

SCORE = {"f1": f1_score, "accuracy": accuracy_score, "youden": balanced_accuracy_score}
"""What each way of choosing maximises; balanced accuracy is (Youden's J + 1) / 2."""


def draw_outputs(task: str, temperature: float, num: int = 20000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large for targets drawn from their probabilities."""
    draw = np.random.default_rng(seed)
    if task == "multiclass":
        logits = draw.normal(size=(num, 4), scale=1.5)
        targets = (softmax(logits, axis=1).cumsum(axis=1) < draw.random((num, 1))).sum(axis=1)
    elif task == "ordinal":
        logits = draw.normal(size=(num, 1), scale=2) - np.array([-2.0, 0.0, 1.5])
        targets = (draw.random((num, 1)) < expit(logits)).sum(axis=1)
    else:
        logits = draw.normal(size=(num, 3 if task == "multilabel" else 1), scale=2)
        targets = (draw.random(logits.shape) < expit(logits)).astype(int)
        targets = targets if task == "multilabel" else targets[:, 0]
    return temperature * logits, targets


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "ordinal"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_of_logits_that_are_too_large_is_found(task: str, temperature: float):
    """Of `ordinal`, targets that are drawn with one number for all labels have the probabilities of the model."""
    outputs, targets = draw_outputs(task, temperature)
    assert calibrate(task, outputs, targets).temperature == pytest.approx(temperature, rel=0.06)


def test_a_temperature_leaves_the_decisions_of_multiclass_alone_and_mends_its_probabilities():
    outputs, targets = draw_outputs("multiclass", 3.0)
    found = calibrate("multiclass", outputs, targets)
    assert found.threshold is None
    assert (found.choose_labels("multiclass", outputs) == outputs.argmax(axis=1)).all()
    said = found.probabilities("multiclass", outputs).max(axis=1)
    right = (outputs.argmax(axis=1) == targets).mean()
    assert said.mean() == pytest.approx(right, abs=0.01)
    assert Calibration().probabilities("multiclass", outputs).max(axis=1).mean() > right + 0.1


def test_the_temperature_is_that_of_the_least_loss():
    outputs, targets = draw_outputs("binary", 2.0, num=200)
    found = calibrate("binary", outputs, targets).temperature

    def loss(temperature: float) -> float:
        signs = np.where(targets == 1, 1, -1)
        return -np.log(expit(signs * outputs[:, 0] / temperature)).mean()

    assert loss(found) < min(loss(found * 1.01), loss(found / 1.01))


@pytest.mark.parametrize("by", ["f1", "accuracy", "youden"])
@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better_and_none_sits_on_a_sample(by: str, seed: int):
    draw = np.random.default_rng(seed)
    targets = (draw.random(60) < 0.3).astype(int)
    outputs = np.round(draw.normal(size=(60, 1)) + targets[:, None], 1)  # rounded: many are the same
    found = calibrate("binary", outputs, targets, by)
    probs = found.probabilities("binary", outputs)[:, 1]
    assert isinstance(found.threshold, float)
    assert abs(probs - found.threshold).min() > 1e-6
    own = SCORE[by](targets, found.choose_labels("binary", outputs))
    every = [SCORE[by](targets, (probs >= level).astype(int)) for level in [*np.unique(probs), 2.0]]
    assert own == pytest.approx(max(every))


def test_the_threshold_is_midway_between_its_neighbours():
    """Separable: any between them decides all rightly, whatever it is chosen by."""
    outputs, targets = np.array([[-3.0], [-2.0], [1.0], [1.5]]), np.array([0, 0, 1, 1])
    for by in ("f1", "accuracy", "youden"):
        found = calibrate("binary", outputs, targets, by)
        lower, upper = expit(np.array([-2.0, 1.0]) / found.temperature)
        assert found.threshold == pytest.approx((lower + upper) / 2)


def test_of_equally_good_thresholds_that_nearest_to_a_half_is_taken():
    """Two of four are right below all, between the second and the third, and above all."""
    outputs, targets = logit(np.array([[0.2], [0.3], [0.9], [0.95]])), np.array([1, 0, 1, 0])
    found = calibrate("binary", outputs, targets, "accuracy")
    probs = found.probabilities("binary", outputs)[:, 1]
    places = [probs[0] / 2, *((probs[1:] + probs[:-1]) / 2), (1 + probs[-1]) / 2]
    right = [accuracy_score(targets, probs >= place) for place in places]
    best = [place for place, score in zip(places, right, strict=True) if score == max(right)]
    assert len(best) == 3
    assert found.threshold == pytest.approx(min(best, key=lambda place: abs(place - 0.5)))


def test_none_may_be_decided_positive_where_that_is_the_most_accurate():
    outputs, targets = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]]), np.array([0, 1, 0, 0, 0])
    assert calibrate("binary", outputs, targets, "accuracy").choose_labels("binary", outputs).sum() == 0
    assert calibrate("binary", outputs, targets, "f1").choose_labels("binary", outputs).sum() > 0


def test_saturated_probabilities_have_no_threshold_above_them():
    """1e4 is a probability of exactly 1: to decide none would be right four times, if it could be; all, three times."""
    outputs, targets = np.array([[1e4]] * 4 + [[0.0]] * 3), np.array([0, 0, 0, 1, 0, 1, 1])
    found = calibrate("binary", outputs, targets, "accuracy")
    assert found.choose_labels("binary", outputs).tolist() == [1] * 7


def test_a_threshold_from_validation_beats_a_half_where_a_classifier_is_shifted():
    draw = np.random.default_rng(0)
    targets = (draw.random(4000) < 0.2).astype(int)
    outputs = (draw.normal(size=4000) + 2 * targets - 4)[:, None]
    found = calibrate("binary", outputs[:2000], targets[:2000], "f1")
    plain = Calibration(found.temperature)
    f1, at_half = (f1_score(targets[2000:], one.choose_labels("binary", outputs[2000:])) for one in (found, plain))
    assert f1 > at_half + 0.2


def test_each_label_of_multilabel_has_its_own_threshold():
    draw = np.random.default_rng(0)
    targets = (draw.random((500, 3)) < 0.4).astype(int)
    targets[:, 2] = 0  # one class only
    outputs = draw.normal(size=(500, 3)) + 2 * targets + np.array([-2.0, 2.0, 0.0])
    found = calibrate("multilabel", outputs, targets)
    assert isinstance(found.threshold, list)
    assert found.threshold[0] < 0.5 < found.threshold[1]
    assert found.threshold[2] == 0.5
    probs = found.probabilities("multilabel", outputs)
    assert (found.choose_labels("multilabel", outputs) == (probs >= np.array(found.threshold))).all()


def test_one_class_and_by_none_keep_a_half():
    outputs, targets = draw_outputs("binary", 1.0, num=50)
    assert calibrate("binary", outputs, targets, "none").threshold == 0.5
    assert calibrate("binary", outputs - 1, targets, "f1").threshold != 0.5
    for by in THRESHOLD_CRITERIA:
        assert calibrate("binary", outputs, np.ones(50), by).threshold == 0.5


@pytest.mark.parametrize("task", ["regression", "pairwise"])
def test_numbers_need_no_calibration(task: str):
    outputs = np.array([[1.5], [2.5]])
    assert calibrate(task, outputs, np.array([1.0, 3.0])) == Calibration()
    assert Calibration().choose_labels(task, outputs).tolist() == [1.5, 2.5]


def test_ordinal_probabilities_below_zero_are_taken_for_tiny_ones():
    """Numbers of a head that sometimes rise from label to label."""
    outputs, targets = draw_outputs("ordinal", 3.0, num=500)
    outputs += np.random.default_rng(1).normal(size=outputs.shape, scale=3)
    found = calibrate("ordinal", outputs, targets)
    assert (found.probabilities("ordinal", outputs) < 0).any()

    def loss(temperature: float) -> float:
        probs = Calibration(temperature).probabilities("ordinal", outputs)
        return -np.log(np.maximum(probs[np.arange(500), targets], 1e-12)).mean()

    assert loss(found.temperature) <= min(map(loss, np.geomspace(0.05, 20, 200))) + 1e-6


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "says"),
    [
        ("binary", np.zeros((0, 1)), np.zeros(0), r"shape \(0, 1\)"),
        ("binary", np.zeros((2, 2)), np.zeros(2), "got 2 numbers a sample, expected 1"),
        ("binary", np.zeros(2), np.zeros(2), r"shape \(2,\)"),
        ("binary", np.zeros((2, 1)), np.array([0, 2]), r"got \[2\], expected 0 to 1"),
        ("binary", np.zeros((2, 1)), np.array([0, 0.5]), r"got \[0.5\]"),
        ("multiclass", np.zeros((2, 3)), np.array([0, 3]), r"got \[3\], expected 0 to 2"),
        ("ordinal", np.zeros((2, 3)), np.array([0, 4]), r"got \[4\], expected 0 to 3"),
        ("multilabel", np.zeros((2, 3)), np.zeros((2, 2)), r"expected \(samples, 3\)"),
        ("multilabel", np.zeros((2, 3)), np.zeros(2), r"shape \(2,\)"),
        ("regression", np.array([[np.nan]]), np.zeros(1), "1 of 1 are not finite"),
        ("regression", np.zeros((1, 1)), np.array([np.inf]), "1 of 1 are not finite"),
        ("pairwise", np.zeros((3, 1)), np.zeros(2), "3 outputs and 2 targets"),
        ("ranking", np.zeros((2, 1)), np.zeros(2), "'ranking', expected one of binary"),
    ],
)
def test_data_that_does_not_fit_is_refused(task: str, outputs: np.ndarray, targets: np.ndarray, says: str):
    with pytest.raises(ValueError, match=says):
        calibrate(task, outputs, targets)


def test_other_ways_and_temperatures_are_refused():
    with pytest.raises(ValueError, match="'F1', expected one of f1, accuracy"):
        calibrate("binary", np.zeros((2, 1)), np.array([0, 1]), "F1")
    with pytest.raises(ValueError, match="temperature: got 0"):
        Calibration(0)


def test_checked_data_has_the_types_that_are_promised():
    outputs, targets = validate_outputs("binary", np.zeros((2, 1), dtype=np.float32), np.array([True, False]))
    assert (outputs.dtype, targets.dtype, targets.tolist()) == (np.float64, np.int64, [1, 0])
    assert validate_targets("ordinal", np.array([4.0]), 5).dtype == np.int64
    assert validate_targets("pairwise", np.array([4]), 0).dtype == np.float64
