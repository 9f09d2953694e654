"""Ratios of sums over records: their values, their intervals, and the differences of two on the same records."""

import math

import numpy as np
import pytest

from vlm.evaluation.record_sums import RecordSums, difference

NUM_RECORDS, NUM_RUNS = 60, 400


def draw_losses(random: np.random.Generator, hardness: np.ndarray, counts: np.ndarray) -> RecordSums:
    """The losses of records of these lengths, whose tokens have the hardness of their record in common."""
    return RecordSums(counts * (hardness + random.normal(0, 0.1, len(counts))), counts)


def test_the_interval_of_records_with_one_token_is_that_of_a_mean():
    values = np.arange(12.0)
    score = RecordSums(values, np.ones(12)).score
    half = 1.96 * values.std(ddof=1) / math.sqrt(12)
    assert (score.value, score.low, score.high) == pytest.approx((5.5, 5.5 - half, 5.5 + half))


def test_samples_of_one_record_are_one_unit():
    """Parts of a record, or a record that is repeated, are no further evidence."""
    random = np.random.default_rng(0)
    sums, counts = random.uniform(1, 9, 20), random.integers(1, 5, 20)
    whole = RecordSums.of_samples(sums, counts)
    parts = RecordSums.of_samples(np.repeat(sums, 3), np.repeat(counts, 3), np.repeat(np.arange(20), 3))
    assert parts.score.low == pytest.approx(whole.score.low)
    assert parts.value == pytest.approx(sums.sum() / counts.sum())


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Alone and as differences; these are far narrower, since both meet the same hard records."""
    random = np.random.default_rng(0)
    hits, paired_hits, widths = 0, 0, []
    for _ in range(NUM_RUNS):
        counts, hardness = random.integers(1, 40, NUM_RECORDS).astype(float), random.normal(2, 0.5, NUM_RECORDS)
        first = draw_losses(random, hardness, counts)
        other = draw_losses(random, hardness + 0.05, counts)
        alone, paired = first.score, difference(first, other)
        assert None not in (alone.low, alone.high, paired.low, paired.high)
        hits += alone.low <= 2 <= alone.high
        paired_hits += paired.low <= 0.05 <= paired.high
        widths.append((paired.high - paired.low) / (alone.high - alone.low))
    assert 0.9 <= hits / NUM_RUNS <= 0.985
    assert 0.9 <= paired_hits / NUM_RUNS <= 0.985
    assert np.mean(widths) < 0.5


def test_models_that_count_tokens_otherwise_can_be_paired():
    """As of another tokenizer: each has a loss of its own tokens."""
    sums = np.linspace(1, 3, 30)
    score = difference(RecordSums(sums, np.ones(30)), RecordSums(sums, np.full(30, 2.0)))
    assert score.value == pytest.approx(-1)
    assert score.low is not None
    assert score.low < -1


def test_few_records_have_no_interval_and_infinite_losses_stay_visible():
    assert RecordSums(np.ones(9), np.ones(9)).score.low is None
    broken = RecordSums(np.array([np.nan, *[1.0] * 19]), np.ones(20))
    assert math.isnan(broken.score.value or 0)
    assert broken.score.low is None
    assert not broken.is_finite
    assert math.isnan(RecordSums(np.zeros(20), np.zeros(20)).value)
