"""Metrics against values worked out by hand and independent formulas, their intervals, and constant predictions."""

import json
from itertools import combinations

import numpy as np
import pytest
import sklearn.metrics
from scipy.special import expit, logit, softmax
from scipy.stats import rankdata

from vlm.evaluation.bootstrap import Score, format_scores, scores_to_json
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import CLUSTERED_SHARES, SHARES, baseline, confusion, scores
from vlm.evaluation.proportions import share_interval
from vlm.models.head_tasks import NUM_OUTPUTS_BY_TASK

METRICS = {
    "binary": {"auroc", "average_precision", "accuracy", "f1", "precision", "recall", "ece"},
    "multiclass": {"auroc", "average_precision", "accuracy", "f1", "ece"},
    "multilabel": {"auroc", "average_precision", "accuracy", "f1", "exact_match", "ece"},
    "regression": {"mae", "rmse", "r2", "spearman"},
    "ordinal": {"accuracy", "mae", "kappa", "spearman"},
    "pairwise": {"pair_accuracy", "spearman"},
}
ERRORS = {"mae", "rmse", "ece"}
"""Metrics whose best value is 0; that of the others is 1."""
PLAIN = Calibration()


def perfect(task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Outputs that are right and sure, their targets, and groups."""
    numbers = np.array([0, 1, 2, 1, 0, 2, 2, 0, 1, 2, 0, 1])
    if task == "binary":
        return np.where(numbers > 0, 40.0, -40.0)[:, None], (numbers > 0).astype(int), None
    if task == "multiclass":
        return 80.0 * np.eye(3)[numbers], numbers, None
    if task == "multilabel":
        return 80.0 * np.eye(3)[numbers] - 40, np.eye(3)[numbers], None
    if task == "ordinal":
        return np.where(numbers[:, None] > np.arange(2), 40.0, -40.0), numbers, None
    values = numbers + np.arange(12) / 100
    return values[:, None], values, np.arange(12) // 3 if task == "pairwise" else None


def values(found: dict[str, Score]) -> dict[str, float | None]:
    return {name: score.value for name, score in found.items()}


@pytest.mark.parametrize("task", NUM_OUTPUTS_BY_TASK)
def test_perfect_predictions(task: str):
    outputs, targets, groups = perfect(task)
    found = scores(task, outputs, targets, PLAIN, groups=groups, num_resamples=20)
    assert set(found) == METRICS[task]
    units = len(targets) if groups is None else len(np.unique(groups))
    for name, score in found.items():
        best = 0 if name in ERRORS else 1
        assert score.value == pytest.approx(best, abs=1e-9), name
        if name in (*SHARES.get(task, ()), *CLUSTERED_SHARES.get(task, ())):
            assert (score.low, score.high) == share_interval(1.0, units)
        else:  # all resamples agree, which says nothing about other samples
            assert score.low is score.high is None, name


@pytest.mark.parametrize("task", NUM_OUTPUTS_BY_TASK)
def test_inverted_predictions_rank_the_wrong_way(task: str):
    outputs, targets, groups = perfect(task)
    turned = -outputs if task != "ordinal" else -outputs[:, ::-1]
    found = values(scores(task, turned, targets, PLAIN, groups=groups, num_resamples=0))
    worst = {"auroc": 0, "pair_accuracy": 0, "spearman": -1, "kappa": -1}
    seen = {name: value for name, value in found.items() if name in worst}
    assert seen
    assert seen == pytest.approx({name: worst[name] for name in seen})


def test_binary_by_hand():
    """Probabilities 0.9, 0.8, 0.6, 0.3, 0.2 of 1, 0, 1, 1, 0: four of six pairs are ordered rightly."""
    probs, targets = np.array([0.9, 0.8, 0.6, 0.3, 0.2]), np.array([1, 0, 1, 1, 0])
    found = values(scores("binary", logit(probs)[:, None], targets, PLAIN, num_resamples=0))
    assert found["auroc"] == pytest.approx(4 / 6)
    assert found["average_precision"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    assert [found[name] for name in ("accuracy", "precision", "recall", "f1")] == pytest.approx([3 / 5, *[2 / 3] * 3])
    assert found["ece"] == pytest.approx(abs(probs - targets).mean())  # each alone in its bin


def test_the_threshold_and_the_temperature_are_used():
    probs, targets = np.array([0.9, 0.8, 0.6, 0.3, 0.2]), np.array([1, 0, 1, 1, 0])
    outputs = 2 * logit(probs)[:, None]
    found = values(scores("binary", outputs, targets, Calibration(2.0, 0.25), num_resamples=0))
    assert [found["recall"], found["precision"]] == pytest.approx([1, 3 / 4])
    assert found["ece"] == pytest.approx(abs(probs - targets).mean())
    assert confusion("binary", outputs, targets, Calibration(2.0, 0.25), 2).tolist() == [[1, 1], [0, 3]]


def test_multiclass_is_the_mean_over_labels_against_the_rest():
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 4, 300)
    outputs = np.round(draw.normal(size=(300, 4)) + np.eye(4)[targets], 1)
    probs = softmax(outputs, axis=1)
    found = values(scores("multiclass", outputs, targets, PLAIN, num_resamples=0))
    assert found["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(targets, probs, multi_class="ovr"))
    areas = [sklearn.metrics.average_precision_score(targets == label, probs[:, label]) for label in range(4)]
    assert found["average_precision"] == pytest.approx(np.mean(areas), abs=1e-6)
    decided = outputs.argmax(axis=1)
    hits = [
        2 * ((decided == k) & (targets == k)).sum() / ((decided == k).sum() + (targets == k).sum()) for k in range(4)
    ]
    assert found["f1"] == pytest.approx(np.mean(hits))
    bins = (probs.max(axis=1) * 15).astype(int)
    gaps = [abs(((decided == targets) - probs.max(axis=1))[bins == one].sum()) for one in range(15)]
    assert found["ece"] == pytest.approx(sum(gaps) / 300, abs=1e-6)


def test_labels_that_are_absent_are_left_out_of_macro_averages():
    """The same numbers as without the fourth label, which no sample has."""
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 3, 60)
    outputs = draw.normal(size=(60, 3)) + np.eye(3)[targets]
    more = np.hstack([outputs, np.full((60, 1), -50.0)])
    found, same = (values(scores("multiclass", one, targets, PLAIN, num_resamples=5)) for one in (more, outputs))
    assert found == pytest.approx(same)
    decided = values(scores("multiclass", np.eye(3)[[0, 2, 1]], np.array([0, 0, 1]), PLAIN, num_resamples=0))
    assert decided["f1"] == pytest.approx((2 / 3 + 1) / 2)
    one_hot = np.eye(4, dtype=int)[targets]
    found = values(scores("multilabel", more, one_hot, PLAIN, num_resamples=5))
    same = values(scores("multilabel", outputs, one_hot[:, :3], PLAIN, num_resamples=5))
    for name in ("auroc", "average_precision", "f1", "exact_match"):
        assert found[name] == pytest.approx(same[name])


def test_multilabel_by_hand():
    outputs = np.array([[2.0, -1.0], [-1.0, 3.0], [1.0, 1.0], [-2.0, -2.0]])
    targets = np.array([[1, 0], [0, 1], [0, 1], [1, 0]])
    found = values(scores("multilabel", outputs, targets, PLAIN, num_resamples=0))
    assert found["exact_match"] == 0.5
    assert found["accuracy"] == 6 / 8
    assert found["f1"] == pytest.approx((0.5 + 1) / 2)
    assert found["auroc"] == pytest.approx((0.5 + 1) / 2)
    assert found["average_precision"] == pytest.approx(((1 + 2 / 4) / 2 + 1) / 2)
    assert confusion("multilabel", outputs, targets, PLAIN, 2).tolist() == [[[1, 1], [1, 1]], [[2, 0], [0, 2]]]


def test_a_single_label_of_multilabel_is_that_of_binary():
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 2, (50, 1))
    outputs = draw.normal(size=(50, 1)) + targets
    found = values(scores("multilabel", outputs, targets, PLAIN, num_resamples=0))
    same = values(scores("binary", outputs, targets[:, 0], PLAIN, num_resamples=0))
    assert found.pop("exact_match") == found["accuracy"]
    assert found == pytest.approx({name: same[name] for name in found})
    counts = confusion("multilabel", outputs, targets, PLAIN, 1)
    assert (counts[0] == confusion("binary", outputs, targets[:, 0], PLAIN, 2)).all()


def test_regression_by_hand():
    outputs, targets = np.array([[1.0], [3.0], [2.0], [6.0]]), np.array([1.0, 2.0, 4.0, 5.0])
    found = values(scores("regression", outputs, targets, PLAIN, num_resamples=0))
    assert found == pytest.approx({"mae": 1.0, "rmse": np.sqrt(1.5), "r2": 1 - 6 / 10, "spearman": 0.8})


def test_ordinal_by_formula():
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 4, 200)
    outputs = (targets + draw.normal(size=200))[:, None] - np.array([0.5, 1.5, 2.5])
    found = values(scores("ordinal", outputs, targets, PLAIN, num_resamples=0))
    decided = (outputs > 0).sum(axis=1)
    assert found["accuracy"] == (decided == targets).mean()
    assert found["mae"] == pytest.approx(abs(decided - targets).mean())
    by_chance = ((decided[:, None] - targets[None]) ** 2).mean()
    assert found["kappa"] == pytest.approx(1 - ((decided - targets) ** 2).mean() / by_chance)
    expected = expit(outputs).sum(axis=1)  # the number of labels that it is above
    assert found["spearman"] == pytest.approx(np.corrcoef(rankdata(expected), rankdata(targets))[0, 1])
    assert confusion("ordinal", outputs, targets, PLAIN, 4).sum(axis=1).tolist() == np.bincount(targets).tolist()


def count_pair_accuracy(given: np.ndarray, relevance: np.ndarray, groups: np.ndarray) -> float:
    """Pair accuracy, pair by pair."""
    right, pairs = 0.0, 0
    for one, other in combinations(range(len(given)), 2):
        if groups[one] == groups[other] and relevance[one] != relevance[other]:
            pairs += 1
            ordered = (given[one] - given[other]) * (relevance[one] - relevance[other])
            right += 1 if ordered > 0 else 0.5 if ordered == 0 else 0
    return right / pairs


@pytest.mark.parametrize("num_groups", [1, 3, 25])
def test_pair_accuracy_is_that_of_counting(num_groups: int):
    draw = np.random.default_rng(num_groups)
    relevance, groups = draw.integers(0, 4, 60), draw.integers(0, num_groups, 60)
    given = np.round(relevance + draw.normal(size=60))  # many ties
    found = scores("pairwise", given[:, None], relevance, PLAIN, groups=groups, num_resamples=50)
    assert found["pair_accuracy"].value == pytest.approx(count_pair_accuracy(given, relevance, groups))


def test_only_samples_of_a_group_are_compared():
    """In order within each group, though not across them; a group of equals and a single sample count nothing."""
    given = np.array([[5.0], [6.0], [0.0], [1.0], [2.0], [9.0], [8.0], [3.0]])
    relevance, groups = np.array([0, 1, 0, 1, 2, 1, 1, 0]), np.array([7, 7, 8, 8, 8, 9, 9, 10])
    found = scores("pairwise", given, relevance, PLAIN, groups=groups, num_resamples=50)
    assert values(found) == pytest.approx({"pair_accuracy": 1.0, "spearman": 1.0})
    together = scores("pairwise", given, relevance, PLAIN, groups=np.zeros(8, dtype=int), num_resamples=5)
    assert together["pair_accuracy"].value < 1


def test_equal_scores_are_half_right():
    found = values(scores("pairwise", np.ones((4, 1)), np.arange(4), PLAIN, groups=np.zeros(4), num_resamples=5))
    assert found == {"pair_accuracy": 0.5, "spearman": None}


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_areas(label: int):
    outputs = np.array([[1.0], [2.0], [-1.0]])
    found = scores("binary", outputs, np.full(3, label), PLAIN, num_resamples=5)
    nothing = Score(None, None, None)
    assert found["auroc"] == found["average_precision"] == nothing
    assert found["accuracy"].value == pytest.approx(2 / 3 if label else 1 / 3)
    assert (found["recall"] == nothing) == (label == 0)
    multi = scores("multiclass", np.eye(3), np.full(3, label), PLAIN, num_resamples=5)
    assert {name for name, score in multi.items() if score.value is None} == {"auroc", "average_precision", "f1"}
    many = scores("multilabel", np.eye(3), np.full((3, 3), label), PLAIN, num_resamples=5)
    assert {name for name, score in many.items() if score.value is None} == {"auroc", "average_precision", "f1"}


def test_constant_data_has_no_correlation_and_one_sample_suffices():
    found = values(scores("regression", np.ones((3, 1)), np.arange(3), PLAIN, num_resamples=5))
    assert (found["spearman"], found["r2"]) == (None, 0)
    found = values(scores("regression", np.arange(3)[:, None], np.ones(3), PLAIN, num_resamples=5))
    assert found["r2"] is None
    found = values(scores("ordinal", np.full((3, 2), -5.0), np.zeros(3), PLAIN, num_resamples=5))
    assert (found["kappa"], found["spearman"], found["accuracy"]) == (None, None, 1.0)
    for task in NUM_OUTPUTS_BY_TASK:
        outputs, targets, groups = perfect(task)
        groups = None if groups is None else groups[:1]
        assert scores(task, outputs[:1], targets[:1], PLAIN, groups=groups, num_resamples=5)


@pytest.mark.parametrize("task", NUM_OUTPUTS_BY_TASK)
def test_a_seed_fixes_the_intervals(task: str):
    outputs, targets, groups = perfect(task)
    noisy = outputs + np.random.default_rng(0).normal(size=outputs.shape) * abs(outputs).max()
    first, same, other = (
        scores(task, noisy, targets, PLAIN, groups=groups, num_resamples=30, seed=seed) for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other
    assert values(first) == values(other)
    for score in first.values():
        assert score.low is None or score.low <= score.value <= score.high


def test_intervals_hold_the_truth_and_are_as_wide_as_they_should_be():
    """Accuracy of 0.8 of both classes, and a mean absolute error of 1, in 25 draws of 150 samples."""
    held, widths = {"accuracy": 0, "mae": 0}, {"accuracy": 0.0, "mae": 0.0}
    for seed in range(25):
        draw = np.random.default_rng(seed)
        targets = draw.integers(0, 2, 150)
        outputs = np.where(draw.random(150) < 0.8, 1, -1) * np.where(targets, 1.0, -1.0)
        found = scores("binary", outputs[:, None], targets, PLAIN, num_resamples=50, seed=seed)
        errors = draw.exponential(size=(150, 1))
        found |= scores("regression", errors, np.zeros(150), PLAIN, num_resamples=50, seed=seed)
        for name, truth in (("accuracy", 0.8), ("mae", 1)):
            held[name] += found[name].low <= truth <= found[name].high
            widths[name] += (found[name].high - found[name].low) / 25
    assert min(held.values()) >= 20
    errors = {"accuracy": np.sqrt(0.8 * 0.2 / 150), "mae": np.sqrt(1 / 150)}
    assert widths == pytest.approx({name: 2 * 1.96 * error for name, error in errors.items()}, rel=0.12)


def test_the_interval_of_groups_is_wider_than_that_of_samples():
    """Of two groups of a hundred, one is ordered rightly and one wrongly."""
    relevance = np.tile(np.arange(100), 2)
    given = np.concatenate([np.arange(100), -np.arange(100)])[:, None]
    found = scores("pairwise", given, relevance, PLAIN, groups=np.arange(200) // 100, num_resamples=50)
    assert found["pair_accuracy"] == Score(0.5, 0.0, 1.0)


def test_the_baseline_varies_with_the_share_of_classes():
    """One positive among fifty: a resample may have several, or none, where the area does not count."""
    outputs, targets = np.arange(50.0)[:, None], np.eye(50, dtype=int)[30]
    found = scores("binary", outputs, targets, PLAIN, num_resamples=50)["auroc"]
    assert found.value == pytest.approx(30 / 49)
    assert found.low < found.value < found.high
    base = baseline("binary", np.zeros(1), targets, num_labels=2, num_resamples=200)["accuracy"]
    assert base.value == pytest.approx(0.98)
    assert (base.low, base.high) == share_interval(0.98, 50)


def test_resamples_that_leave_a_metric_undefined_do_not_count():
    """Of two samples, half of the resamples are one of them twice."""
    found = scores("regression", np.array([[0.0], [1.0]]), np.array([0.0, 1.0]), PLAIN, num_resamples=20)
    assert found["r2"] == Score(1.0)


def test_no_resamples_give_no_intervals():
    outputs, targets, _ = perfect("regression")
    found = scores("regression", outputs, targets, PLAIN, num_resamples=0)
    assert all((score.low, score.high) == (None, None) and score.value is not None for score in found.values())
    assert baseline("pairwise", targets, targets, num_labels=0, num_resamples=0)["pair_accuracy"].low is None


def test_baselines_by_hand():
    def compute_baseline(task: str, train: list, targets: list, num_labels: int) -> dict[str, float | None]:
        return values(baseline(task, np.array(train), np.array(targets), num_labels=num_labels, num_resamples=5))

    assert compute_baseline("binary", [0, 1, 0], [0, 1, 1, 1], 2) == {
        "accuracy": 0.25,
        "f1": 0,
        "precision": None,
        "recall": 0,
    }
    assert compute_baseline("binary", [1, 1, 0], [0, 1, 1, 1], 2)["f1"] == pytest.approx(6 / 7)
    assert compute_baseline("multiclass", [2, 2, 0], [2, 0, 1, 2], 3) == pytest.approx(
        {"accuracy": 0.5, "f1": (2 / 3) / 3}
    )
    assert compute_baseline("multilabel", [[1, 0], [1, 1], [1, 0]], [[1, 1], [1, 0]], 2) == {
        "f1": 0, "accuracy": 0.75, "exact_match": 0.5  # the first label has one class, and so no part in f1
    }  # fmt: skip
    assert compute_baseline("regression", [1, 2, 6], [1, 5], 0) == pytest.approx({"mae": 2, "rmse": 2, "r2": 0})
    assert compute_baseline("ordinal", [0, 1, 1, 3, 3, 3], [0, 1, 3], 4) == pytest.approx(
        {"accuracy": 1 / 3, "mae": 1, "kappa": 0}
    )
    assert compute_baseline("pairwise", [0, 1], [1, 2, 3], 0) == {"pair_accuracy": 0.5}


def test_a_baseline_has_the_resamples_of_the_scores():
    """A head that always gives the training mean has its baseline's errors, interval and all."""
    targets, train = np.random.default_rng(0).normal(size=40), np.arange(4.0)
    found = scores("regression", np.full((40, 1), 1.5), targets, PLAIN, num_resamples=40, seed=3)
    base = baseline("regression", train, targets, num_labels=0, num_resamples=40, seed=3)
    assert base == {name: found[name] for name in ("mae", "rmse", "r2")}
    assert found["mae"].low < found["mae"].high


def test_confusion_counts_labels_that_are_absent():
    outputs = np.array([[3.0, 0, 0], [0, 3.0, 0], [3.0, 0, 0]])
    counts = confusion("multiclass", outputs, np.array([0, 0, 1]), PLAIN, 3)
    assert counts.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert confusion("regression", outputs[:, :1], np.zeros(3), PLAIN, 0) is None
    assert confusion("pairwise", outputs[:, :1], np.zeros(3), PLAIN, 0) is None


def test_the_table_and_the_json():
    found = {"mae": Score(1234.5678, 1000.0, 2000.0), "r2": Score(None, None, None), "f1": Score(0.5, None, None)}
    base = {"mae": Score(0.00123, 0.0, 0.5)}
    assert format_scores(found, {"baseline": base}).splitlines() == [
        "metric  value [95% interval]  baseline",
        "mae     1235 [1000, 2000]     0.00123 [0.000, 0.500]",
        "r2      undefined",
        "f1      0.500",
    ]
    again = json.loads(json.dumps(scores_to_json(found), allow_nan=False))
    assert again["mae"] == {"value": 1234.5678, "low": 1000.0, "high": 2000.0}
    assert again["r2"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("task", NUM_OUTPUTS_BY_TASK)
def test_every_task_can_be_written_as_json(task: str):
    """Plain numbers, none of numpy's and no NaN, undefined ones too."""
    outputs, targets, groups = perfect(task)
    once = None if groups is None else groups[:1]
    for found in (
        scores(task, outputs, targets, PLAIN, groups=groups, num_resamples=5),
        scores(task, outputs[:1], targets[:1], PLAIN, groups=once, num_resamples=5),
        baseline(task, targets, targets, num_labels=2 if task == "binary" else 3, num_resamples=5),
    ):
        json.dumps(scores_to_json(found), allow_nan=False)


def test_groups_are_for_pairwise_alone_and_it_needs_them():
    outputs, targets, _ = perfect("regression")
    with pytest.raises(ValueError, match="groups: regression has none"):
        scores("regression", outputs, targets, PLAIN, groups=np.zeros(12))
    for groups, says in ((None, "got None"), (np.zeros(3), r"got \(3,\), expected the group of each of 12")):
        with pytest.raises(ValueError, match=says):
            scores("pairwise", outputs, targets, PLAIN, groups=groups)


def test_data_that_does_not_fit_is_refused():
    for call in (
        lambda: scores("binary", np.zeros((0, 1)), np.zeros(0), PLAIN),
        lambda: baseline("binary", np.zeros(0), np.zeros(3), num_labels=2),
        lambda: baseline("multiclass", np.array([0, 3]), np.zeros(3), num_labels=3),
        lambda: confusion("binary", np.zeros((2, 1)), np.zeros(3), PLAIN, 2),
    ):
        with pytest.raises(ValueError, match=r"targets of (binary|multiclass)|outputs of binary|binary: got"):
            call()
