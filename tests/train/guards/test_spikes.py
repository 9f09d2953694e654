"""What a spike is: far above what is usual, however usual differs."""

import pytest

from vlm.train.guards.spikes import MIN_STEPS, SpikeDetector, robust_scale


def usual(step: int) -> dict[str, float]:
    return {"loss": 2.0 + 0.1 * (step % 5), "gradient norm": 1.0 + 0.2 * (step % 3)}


def warmed_up(number: int = MIN_STEPS, window: int = 100) -> SpikeDetector:
    detector = SpikeDetector(window, threshold=10.0)
    assert not any(detector.find(usual(step)) for step in range(number))
    return detector


def test_a_number_far_above_is_named():
    assert warmed_up().find({"loss": 9.0, "gradient norm": 1.0}).startswith("the loss 9 is 4")
    both = warmed_up().find({"loss": 9.0, "gradient norm": 50.0})
    assert "the loss 9 " in both
    assert "the gradient norm 50 " in both


@pytest.mark.parametrize("numbers", [{"loss": 0.1, "gradient norm": 0.1}, {"loss": 2.6, "gradient norm": 1.6}])
def test_what_is_below_or_near_is_none(numbers: dict[str, float]):
    assert warmed_up().find(numbers) is None


def test_few_steps_say_nothing():
    assert warmed_up(MIN_STEPS - 1).find({"loss": 9.0, "gradient norm": 1.0}) is None


def test_one_spike_does_not_hide_the_next_and_a_new_level_is_usual_in_the_end():
    detector = warmed_up(window=20)
    found = [detector.find({"loss": 9.0, "gradient norm": 1.0}) is not None for _ in range(20)]
    assert found[:5] == [True] * 5
    assert not found[-1]


def test_equal_numbers_have_a_deviation():
    assert robust_scale([2.0] * 9) == (2.0, pytest.approx(0.04))
    assert robust_scale([0.0] * 9)[1] > 0
