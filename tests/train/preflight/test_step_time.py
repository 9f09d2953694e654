"""The time of a mean step: a constant and a part that grows, and an interval that holds what it says."""

import random

import pytest

from vlm.train.preflight.step_time import fit_step_time


def test_a_constant_and_a_slope_are_found():
    sizes = [1.0, 2.0, 3.0, 6.0]
    found = fit_step_time(sizes, [10 + 2 * size for size in sizes], size=5.0, num_steps=100)
    assert found.mean == pytest.approx(20)
    assert found.margin == pytest.approx(0, abs=1e-9)


def test_few_steps_grow_in_proportion():
    found = fit_step_time([1.0, 3.0], [2.0, 6.0], size=4.0, num_steps=10)
    assert (found.mean, found.margin) == (pytest.approx(8.0), pytest.approx(0.0, abs=1e-9))
    assert fit_step_time([2.0], [4.0], size=3.0, num_steps=10).margin is None


def test_larger_steps_never_take_less_time():
    assert fit_step_time([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], size=4.0, num_steps=10).mean == pytest.approx(2.5)


def test_nine_of_ten_intervals_hold_the_mean_of_the_run():
    """Steps of 1 + size seconds, 10 % of noise, 4 of them timed and 50 made."""
    chance, held = random.Random(0), 0
    for _ in range(300):
        sizes = [chance.uniform(1, 3) for _ in range(54)]
        seconds = [(1 + size) * chance.gauss(1, 0.1) for size in sizes]
        run = sum(seconds[4:]) / 50
        found = fit_step_time(sizes[:4], seconds[:4], sum(sizes[4:]) / 50, 50)
        assert found.margin is not None
        held += abs(found.mean - run) <= found.margin
    assert held / 300 > 0.85
