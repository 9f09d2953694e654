"""The line of a run: what it shows, what a narrow terminal loses first, and what a trend is."""

import random

import pytest

from vlm.runs.status_line import (
    find_trend,
    format_count,
    format_evaluation,
    format_line,
    format_rate,
    format_seconds,
)

VALUES = {
    "step": 120, "max_steps": 1000, "epoch": 0.344827, "loss": 2.31449, "loss_trend": "falling", "seconds_left": 4321,
    "tokens_per_second": 12345.6, "mfu": 0.4123, "memory_bytes": 3 * 2**30, "waiting_share": 0.021,
    "learning_rates": {"connector": 1.98e-3, "language_model": 2e-5}, "host": "a", "pid": 1,
}  # fmt: skip


def test_the_line_has_all_that_is_known():
    assert format_line(VALUES) == (
        "step 120/1,000  epoch 0.34  loss 2.314 ↘  lr connector 1.98e-3, llm 2e-5  12.3k tokens/s  MFU 41.2%  "
        "3.00 GiB  data wait 2%  72 min left"
    )
    assert format_line({"step": 3, "loss": None, "learning_rates": {}}) == "step 3"
    assert format_line({"step": 3, "samples_per_second": 7.0}) == "step 3  7 samples/s"


def test_a_narrow_terminal_loses_what_matters_least():
    narrow = format_line(VALUES, 60)
    assert len(narrow) <= 60
    assert narrow == "step 120/1,000  loss 2.314 ↘  12.3k tokens/s  72 min left"
    assert format_line(VALUES, 20) == "step 120/1,000  loss"


def test_only_the_arrow_is_coloured():
    assert format_line(VALUES, coloured=True).replace("\x1b[32m↘\x1b[0m", "↘") == format_line(VALUES)
    flat = VALUES | {"loss_trend": "flat"}
    assert format_line(flat, coloured=True) == format_line(flat)


def test_a_trend_is_told_from_noise():
    steps, noise = range(20), random.Random(0)
    around = [1 + noise.gauss(0, 0.1) for _ in steps]
    assert find_trend(steps, around) == "flat"
    assert find_trend(steps, [value - 0.05 * step for step, value in enumerate(around)]) == "falling"
    assert find_trend(steps, [value + 0.05 * step for step, value in enumerate(around)]) == "rising"
    assert find_trend(steps[:4], around[:4]) is None, "too few"
    assert find_trend(steps, [float("nan"), *around[1:]]) is None
    assert find_trend(steps, [1.0] * 20) == "flat"
    long_ago = [5 - 0.1 * step for step in range(30)]
    assert find_trend(range(50), [*long_ago, *around]) == "flat", "of the last twenty logs"


def test_an_evaluation_has_the_gain_with_its_interval():
    metrics = {
        "eval_loss": 4.8821, "eval_loss_ci95": 0.05, "eval_blank_loss": 6.553, "eval_image_gain": 1.768,
        "eval_image_gain_ci95": 0.2387, "eval_exact_match": 0.5, "eval_exact_match_ci95": 0.1, "eval_runtime": 2.0,
        "eval_samples_per_second": 3.0,
    }  # fmt: skip
    assert format_evaluation(1200, metrics) == (
        "evaluation at step 1,200:  loss 4.882 ± 0.05  on blank images 6.553  image gain 1.768 ± 0.24  "
        "exact_match 0.5 ± 0.1  (2 s)"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5340, "89 min"), (11100, "3 h 05 min"), (2e5, "2 d 7 h")],
)
def test_times_are_short(seconds: float, shown: str):
    assert format_seconds(seconds) == shown


def test_numbers_are_short():
    assert [format_count(number) for number in (0.5, 72.5, 999.4, 12345, 2.5e6)] == [
        "0.5",
        "72.5",
        "999",
        "12.3k",
        "2.5M",
    ]
    assert [format_rate(rate) for rate in (0.0, 2e-5, 1.854e-3, 1.0)] == ["0", "2e-5", "1.85e-3", "1e0"]
