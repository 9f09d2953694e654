"""Intervals of shares, at 0 and 1 too."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from vlm.evaluation.bootstrap import Score, bootstrap, make_score, mean_score
from vlm.evaluation.hallucination import compute_hallucination_metrics
from vlm.evaluation.paired import paired_difference
from vlm.evaluation.proportions import NORMAL_QUANTILE, paired_share_interval, share_interval
from vlm.evaluation.record_sums import RecordSums, difference

SQUARE = NORMAL_QUANTILE**2


@pytest.mark.parametrize(("gained", "lost", "number"), [(4, 0, 30), (1, 7, 21), (12, 2, 50), (0, 0, 30), (3, 3, 12)])
def test_the_ends_are_the_differences_that_the_score_test_just_allows(gained: int, lost: int, number: int):
    """With the likeliest share, which is searched for here."""

    def statistic(value: float) -> float:
        def improbability(share: float) -> float:
            shares = np.array([share + value, share, 1 - 2 * share - value])
            counts = np.array([gained, lost, number - gained - lost])
            return -float((counts * np.log(shares))[counts > 0].sum())

        bounds = max(0.0, -value) + 1e-12, (1 - value) / 2 - 1e-12
        share = minimize_scalar(improbability, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x  # pyright: ignore
        return (gained - lost - number * value) / np.sqrt(number * (2 * share + value * (1 - value)))

    found = [statistic(end) for end in paired_share_interval(gained, lost, number)]
    assert found == pytest.approx([NORMAL_QUANTILE, -NORMAL_QUANTILE], abs=1e-5)


def test_published_intervals_are_met():
    """Bentur et al. 2009 by Tango's method, as in Fagerland, Lydersen and Laake 2014."""
    assert paired_share_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    end = SQUARE / (30 + SQUARE)
    assert paired_share_interval(0, 0, 30) == pytest.approx((-end, end), abs=1e-6)
    assert paired_share_interval(30, 0, 30) == pytest.approx(((30 - SQUARE) / (30 + SQUARE), 1), abs=1e-6)
    assert paired_share_interval(0, 30, 30)[0] == -1


@pytest.mark.parametrize(("right", "interval"), [(0, (0, 0.11351)), (30, (0.88649, 1)), (1, (0.00591, 0.16670))])
def test_a_share_has_an_interval_at_0_and_1_too(right: int, interval: Sequence[float]):
    values = np.array([1.0] * right + [0.0] * (30 - right))
    score = mean_score(values, 100)
    assert (score.value, score.low, score.high) == pytest.approx((right / 30, *interval), abs=1e-4)
    assert mean_score(values, 0) == Score(right / 30)


def test_other_means_keep_the_bootstrap_and_say_nothing_where_all_agree():
    assert mean_score(np.zeros(30), 100, is_bounded=False) == Score(0.0)
    assert mean_score(np.full(30, 0.1), 100) == Score(pytest.approx(0.1))
    parts = mean_score(np.array([0.0, 0.5] * 15), 100)
    assert parts.low is not None
    assert 0.1 < parts.low < 0.25
    assert make_score(2.0, [2.0] * 10) == Score(2.0)
    assert make_score(1.0, [1.0, 1 - 4e-8] * 5) == Score(1.0), "that is single precision"
    assert make_score(1.0, [1.0, 1 - 4e-5] * 5).low is not None


def test_shares_of_clusters_are_bounded_by_the_number_of_clusters():
    values = np.array([[1, 1], [1, 1], [1, 0]] * 10)

    def compute(rows: np.ndarray) -> dict[str, float]:
        return {"all": float(values[rows].mean()), "first": float(values[rows, 0].mean())}

    found = bootstrap(compute, 30, 500, 0, clustered_shares=("all", "first"))
    assert (found["first"].low, found["first"].high) == share_interval(1.0, 30)
    assert found["all"].low == pytest.approx(0.75, abs=0.03)


def test_answers_of_yes_have_the_interval_of_a_share_where_each_image_has_one_question():
    answers, references = ["yes"] * 30, [["yes"]] * 30
    apart, together = (
        compute_hallucination_metrics(["pope"], answers, ["no"] * 30, references, images)
        for images in ([f"{number}.png" for number in range(30)], [f"{number // 2}.png" for number in range(30)])
    )
    assert (apart["pope_accuracy"].low, apart["pope_accuracy"].high) == share_interval(1.0, 30)
    assert (together["pope_accuracy"].low, together["pope_accuracy"].high) == share_interval(1.0, 15)
    assert apart["blank_pope_accuracy"].high == share_interval(0.0, 30)[1]
    assert apart["pope_recall"] == Score(1.0)


def test_a_paired_difference_of_records_that_agree_is_not_certain():
    wrong, right, alone = np.zeros(30), np.ones(30), np.arange(30)
    end = SQUARE / (30 + SQUARE)
    for before, after, value in ((wrong, wrong, 0), (right, right, 0), (wrong, right, 1)):
        score = paired_difference(before, after, alone)
        assert score.value == value
        assert (score.low, score.high) == paired_share_interval(30 * value, 0, 30)
    assert paired_difference(wrong, wrong, alone // 2).high == pytest.approx(SQUARE / (15 + SQUARE), abs=1e-6)
    assert paired_difference(wrong, wrong, alone, is_bounded=False) == Score(0.0)
    assert paired_difference(wrong + 0.5, wrong + 0.5, alone) == Score(0.0)
    assert end == pytest.approx(0.1135, abs=1e-4)


def test_clusters_that_differ_keep_the_bootstrap():
    before, after = np.zeros(40), np.array([1.0, 0, 0, 0] * 10)
    score = paired_difference(before, after, np.arange(40) // 2)
    assert score.low is not None
    assert 0.1 < score.low < 0.25


def test_losses_that_are_the_same_for_all_records_have_no_interval():
    sums, counts = np.full(30, 0.7), np.ones(30)
    assert RecordSums(sums, counts).score == Score(pytest.approx(0.7))
    assert difference(RecordSums(sums, counts), RecordSums(sums, counts)) == Score(0.0)
    varied = RecordSums(np.linspace(0.1, 3, 30), counts)
    assert difference(varied, varied) == Score(0.0)
    assert varied.score.low is not None
