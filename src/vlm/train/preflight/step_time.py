"""The seconds of a run's mean step, from the timed steps of a probe, with an interval.

A step takes a constant time and a time that grows with its size: operations, or tokens. Both are fitted to the timed
steps by least squares. What the steps scatter around the fit tells how far off the mean of the run may be, if it runs
as fast as the probe did; see `DRIFT`.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

DRIFT = 0.15
"""How much slower or faster a run is than its probe, as a share of a step: twelve of fourteen runs of
`benchmarks/preflight.py` are within it. The scatter of the timed steps comes on top."""
MIN_FITTED = 4
"""Timed steps that a constant time is fitted to; with fewer, the time is proportional to the size."""
CONFIDENCE = 0.9
"""The probability with which the interval holds the mean, if the run's steps scatter as the probe's do."""
T_QUANTILES = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81, 1.80, 1.78)
"""Student's t at 95 %, for 1 to 12 degrees of freedom: two tails of 5 % lie outside."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a mean step.

    Attributes:
        mean: what is predicted.
        margin: half the width of the interval around it; None: it takes two timed steps or more.
    """

    mean: float
    margin: float | None


def fit_step_time(sizes: Sequence[float], seconds: Sequence[float], size: float, num_steps: int) -> StepTime:
    """Predict the mean time of steps.

    Args:
        sizes: size of each timed step, above 0.
        seconds: of each timed step.
        size: mean size of the steps that are predicted.
        num_steps: number of steps that are predicted.
    """
    number, mean_size, mean = len(sizes), statistics.mean(sizes), statistics.mean(seconds)
    ratio = mean / mean_size
    spread = sum((value - mean_size) ** 2 for value in sizes)
    slope, freedom = ratio, number - 1
    if number >= MIN_FITTED and spread > 0:
        slope = min(max(statistics.linear_regression(sizes, seconds).slope, 0.0), ratio)  # no constant below 0
        freedom = number - 2
    away = size - mean_size
    predicted = mean + slope * away
    if freedom < 1:
        return StepTime(predicted, None)
    rests = (value - mean - slope * (own - mean_size) for own, value in zip(sizes, seconds, strict=True))
    deviation = math.sqrt(sum(rest**2 for rest in rests) / freedom)
    leverage = away**2 / spread if spread > 0 else 0.0
    quantile = T_QUANTILES[min(freedom, len(T_QUANTILES)) - 1]
    return StepTime(predicted, quantile * deviation * math.sqrt(1 / number + 1 / max(num_steps, 1) + leverage))
