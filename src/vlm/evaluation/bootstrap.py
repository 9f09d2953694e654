"""Metrics with 95% intervals by the percentile bootstrap, and those of shares, as tables and as JSON.

An interval of the bootstrap without width is left out: all resamples agree where all records do, which says nothing
about other records. Shares have Wilson's interval, see `proportions.py`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tabulate import tabulate

from vlm.evaluation.proportions import share_interval

INTERVAL_PERCENTILES = (2.5, 97.5)
"""Percentiles of the resampled values that bound the interval."""
ROUNDING = 1e-6
"""How much equal values may differ, in single precision; relative to a metric above 1."""


@dataclass(frozen=True)
class Score:
    """The value of a metric.

    Attributes:
        value: the metric on all data; None if it is undefined.
        low: lower end of its 95% interval; None if there is none.
        high: upper end.
        resampled: what `bootstrap` found on each resample, NaN where it is undefined; empty for other intervals.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    resampled: Sequence[float] = field(default=(), compare=False, repr=False)


def bootstrap(
    compute_metrics: Callable[[np.ndarray], dict[str, float]],
    num_units: int,
    num_resamples: int,
    seed: int,
    *,
    shares: Collection[str] = (),
    clustered_shares: Collection[str] = (),
) -> dict[str, Score]:
    """Return metrics of all units, with intervals from resampling units with replacement.

    Args:
        compute_metrics: takes the indices of units, `(units,)`, and returns NaN where a metric is undefined.
        num_units: number of units.
        num_resamples: number of resamples; 0: no intervals.
        seed: seeds the resamples.
        shares: metrics that are the share of units of which something is true; they have Wilson's interval instead.
        clustered_shares: metrics that are the share of things, of which a unit has several; at 0 and at 1, they have
            Wilson's interval for as many things as there are units.
    """
    random = np.random.RandomState(seed)
    points = compute_metrics(np.arange(num_units))
    resampled = [compute_metrics(random.randint(num_units, size=num_units)) for _ in range(num_resamples)]
    values = {name: [metrics[name] for metrics in resampled] for name in points}
    scores = {name: replace(make_score(value, values[name]), resampled=values[name]) for name, value in points.items()}
    for name, score in scores.items():
        is_share = name in shares or (name in clustered_shares and score.value in (0.0, 1.0))
        if num_resamples and is_share and score.value is not None:
            low, high = share_interval(score.value, num_units)
            scores[name] = replace(score, low=low, high=high)
    return scores


def mean_score(values: np.ndarray, num_resamples: int, *, is_bounded: bool = True) -> Score:
    """Return the mean of a metric of single samples, `(samples,)`; undefined without samples.

    If all values are 0 or 1, it is a share; unless `is_bounded` is False, for a metric that may be greater than 1.
    """
    if not len(values):
        return Score(None)
    shares = ("mean",) if is_bounded and is_binary(values) else ()
    scores = bootstrap(
        lambda rows: {"mean": float(values[rows].mean())}, len(values), num_resamples, seed=0, shares=shares
    )
    return scores["mean"]


def is_binary(values: np.ndarray) -> bool:
    """Return whether all values are 0 or 1."""
    return bool(np.isin(values, (0, 1)).all())


def make_score(value: float, resampled: Sequence[float] = ()) -> Score:
    """Return a value with the interval of the resampled values that are defined; NaN is undefined.

    There is no interval where all of these are the same.
    """
    if np.isnan(value):
        return Score(None)
    defined = [number for number in resampled if not np.isnan(number)]
    if not defined:
        return Score(float(value))
    if np.ptp(defined) <= ROUNDING * max(abs(value), 1.0):
        return Score(float(value))
    low, high = np.percentile(defined, INTERVAL_PERCENTILES)
    return Score(float(value), float(low), float(high))


def format_scores(scores: dict[str, Score], others: Mapping[str, dict[str, Score]] | None = None) -> str:
    """Return a table of metrics with their 95% intervals; `others` adds a column of scores for each title."""
    columns = [scores, *(others or {}).values()]
    rows = [(name, *(_format_score(column[name]) if name in column else "" for column in columns)) for name in scores]
    header = ("metric", "value [95% interval]", *(others or {}))
    return tabulate([header, *rows], tablefmt="plain", disable_numparse=True)


def _format_score(score: Score) -> str:
    if score.value is None:
        return "undefined"
    if score.low is None or score.high is None:
        return _format_number(score.value)
    return f"{_format_number(score.value)} [{_format_number(score.low)}, {_format_number(score.high)}]"


def _format_number(value: float) -> str:
    """Return a number with three decimals, or with four digits where three decimals would be too few or too many."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.4g}"


def scores_to_json(scores: dict[str, Score]) -> dict[str, dict[str, float | None]]:
    """Return metrics for a JSON file."""
    return {name: {"value": score.value, "low": score.low, "high": score.high} for name, score in scores.items()}


def flatten_scores(scores: Mapping[str, Score]) -> dict[str, float]:
    """Return defined metrics as numbers for a log; `NAME_ci95` is half the width of the interval of `NAME`."""
    numbers = {}
    for name, score in scores.items():
        if score.value is not None:
            numbers[name] = score.value
        if score.low is not None and score.high is not None:
            numbers[f"{name}_ci95"] = (score.high - score.low) / 2
    return numbers
