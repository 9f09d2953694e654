"""The difference between two models on the same records, with its 95% interval. Imports no torch.

An interval is the percentile bootstrap over units that are drawn with replacement (Efron and Tibshirani 1993, chapter
13): the records that show the same images are one unit, since they are no independent evidence. Shares have Tango's
interval (`proportions.py`) where each record is its own unit, and where all units agree; where all units agree in
another measure, there is no interval.
"""

from collections.abc import Sequence

import numpy as np

from vlm.evaluation.bootstrap import Score, is_binary, make_score
from vlm.evaluation.proportions import paired_share_interval

NUM_RESAMPLES = 2000
MIN_UNITS = 10
"""The fewest units of an interval: of fewer, the bootstrap's are too narrow."""


def paired_difference(before: np.ndarray, after: np.ndarray, units: np.ndarray, *, is_bounded: bool = True) -> Score:
    """Return the mean of after minus before with its interval.

    Args:
        before: `(records,)`, a measure of one model.
        after: `(records,)`, that of the other.
        units: `(records,)`, the unit of each record.
        is_bounded: whether the measure is from 0 to 1; it is a share where all its values are 0 or 1.
    """
    _, places = np.unique(units, return_inverse=True)
    sums, counts = np.bincount(places, after - before), np.bincount(places)
    difference = float(sums.sum() / counts.sum())
    if len(sums) < MIN_UNITS:
        return Score(difference)
    means = sums / counts
    is_share = is_bounded and is_binary(before) and is_binary(after)
    if is_share and (counts.max() == 1 or (np.ptp(means) == 0 and abs(means[0]) in (0, 1))):
        interval = paired_share_interval(int((means > 0).sum()), int((means < 0).sum()), len(means))
        return Score(difference, *interval)
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(sums), size=len(sums)) for _ in range(NUM_RESAMPLES))
    return make_score(difference, [float(sums[rows].sum() / counts[rows].sum()) for rows in drawn])


def units_of(media: Sequence[str]) -> np.ndarray:
    """Return the unit of each record, `(records,)`: the same for the same images; a record without any is its own."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(paths or f"\0{place}", len(numbers)) for place, paths in enumerate(media)])
