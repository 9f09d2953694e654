"""The difference between two models on the same records, with its 95% interval. Imports no torch.

An interval is the percentile bootstrap over units that are drawn with replacement (Efron and Tibshirani 1993, chapter
13): the records that show the same images are one unit, since they are no independent evidence.
"""

from collections.abc import Sequence

import numpy as np

from vlm.evaluation.bootstrap import Score, make_score

NUM_RESAMPLES = 2000
MIN_UNITS = 10
"""The fewest units of an interval: of fewer, the bootstrap's are too narrow."""


def paired_difference(before: np.ndarray, after: np.ndarray, units: np.ndarray) -> Score:
    """Return the mean of after minus before with its interval; all arguments are `(records,)`."""
    _, places = np.unique(units, return_inverse=True)
    sums, counts = np.bincount(places, after - before), np.bincount(places)
    difference = float(sums.sum() / counts.sum())
    if len(sums) < MIN_UNITS:
        return Score(difference)
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(sums), size=len(sums)) for _ in range(NUM_RESAMPLES))
    return make_score(difference, [float(sums[rows].sum() / counts[rows].sum()) for rows in drawn])


def units_of(media: Sequence[str]) -> np.ndarray:
    """Return the unit of each record, `(records,)`: the same for the same images; a record without any is its own."""
    numbers: dict[str, int] = {}
    return np.array([
        numbers.setdefault(paths or f"\0{place}", len(numbers)) for place, paths in enumerate(media)
    ])  # fmt: skip
