"""A metric as a ratio of two sums over records, such as the loss per token, with its interval. Imports no torch.

With the sum s_i of record i (the losses of its tokens) and its count n_i (their number), the metric is

    L = sum_i s_i / sum_i n_i

and its 95% interval, by linearisation of a ratio (Cochran 1977, Sampling Techniques, 3rd edition, section 6.4),

    L ± 1.96 sqrt(R / (R - 1) sum_i e_i^2),  e_i = (s_i - L n_i) / sum_j n_j

for the R records with a count. Records are the units, since the tokens of one record belong together. The difference of
two metrics on the same records has the e_i of the one minus those of the other in their place: what makes a record hard
for both is no part of its noise. Where all e_i are 0, the records say nothing about noise, and there is no interval.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlm.evaluation.bootstrap import ROUNDING, Score
from vlm.evaluation.paired import MIN_UNITS
from vlm.evaluation.proportions import NORMAL_QUANTILE


@dataclass(frozen=True, eq=False)
class RecordSums:
    """The sum and the count of each record, of one metric.

    Attributes:
        sums: `(records,)`, float64.
        counts: `(records,)`, float64, none negative.
    """

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of_samples(cls, sums: np.ndarray, counts: np.ndarray, records: np.ndarray | None = None) -> "RecordSums":
        """Return what samples `(samples,)` add up to; `records` `(samples,)` numbers the record of each, from 0.

        Without `records`, each sample is a record.
        """
        sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
        if records is None:
            return cls(sums, counts)
        return cls(np.bincount(records, sums), np.bincount(records, counts))

    @property
    def value(self) -> float:
        """The metric; NaN where no record has a count."""
        total = self.counts.sum()
        return float(self.sums.sum() / total) if total else math.nan

    @property
    def deviations(self) -> np.ndarray:
        """The part that each record has in the deviation of the metric, e_i: `(records,)`."""
        return (self.sums - self.value * self.counts) / max(self.counts.sum(), 1)

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(np.isfinite(self.sums).all())

    @property
    def score(self) -> Score:
        """The metric with its interval; without one for fewer than 10 records, for a sum that is not finite, and where
        all records agree.
        """
        return _with_interval(self.value, self.deviations, self.counts > 0)


def difference(first: RecordSums, other: RecordSums) -> Score:
    """Return the metric of `other` minus that of `first`, both of the same records, with its interval."""
    return _with_interval(
        other.value - first.value, other.deviations - first.deviations, (first.counts > 0) | (other.counts > 0)
    )


def _with_interval(value: float, deviations: np.ndarray, counted: np.ndarray) -> Score:
    number = int(counted.sum())
    if number < MIN_UNITS or not np.isfinite(deviations).all():
        return Score(value)
    half_width = NORMAL_QUANTILE * math.sqrt(number / (number - 1) * float((deviations**2).sum()))
    if half_width <= ROUNDING * max(abs(value), 1.0):
        return Score(value)
    return Score(value, value - half_width, value + half_width)


def scores_of(metrics: Mapping[str, RecordSums]) -> dict[str, Score]:
    """Return each metric with its interval."""
    return {name: sums.score for name, sums in metrics.items()}
