"""95% intervals of shares, such as the share of right answers, that hold at 0 and 1 too. Imports no torch.

The bootstrap and the normal approximation give a share of 0 or 1 an interval without width: all records agree, so all
resamples do. That 30 of 30 answers are wrong still allows one in ten to be right.

A share has Wilson's interval (Wilson 1927). The difference of two shares on the same records has that of Tango (1998,
Statistics in Medicine 17, 891-908): all differences d whose score test is not significant. With g records that only
the second model has right, and l that only the first has, of n,

    (g - l - n d)^2 <= 1.96^2 n (2 q + d (1 - d)),

where q is the likeliest share of records that only the first has right, given d. For g = l = 0 it is
± 1.96^2 / (n + 1.96^2).
"""

import math

NORMAL_QUANTILE = 1.96
TOLERANCE = 1e-10


def share_interval(share: float, number: int) -> tuple[float, float]:
    """Return Wilson's interval of a share of `number` records, at least one."""
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(round(share * number), number).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_share_interval(gained: int, lost: int, number: int) -> tuple[float, float]:
    """Return Tango's interval of the difference of two shares on the same records.

    Args:
        gained: number of records that count in the second share alone.
        lost: number of records that count in the first share alone.
        number: number of records.
    """
    low = _find_end(gained, lost, number)
    return low, -_find_end(lost, gained, number)


def _find_end(gained: int, lost: int, number: int) -> float:
    """Return the lower end of the interval; the upper one is the lower one of the opposite difference, negated."""
    from scipy.optimize import root_scalar  # slow to import

    def excess(difference: float) -> float:
        """Return the statistic of the score test of a difference minus its quantile."""
        linear = (2 * number - gained + lost) * difference - gained - lost
        root = math.sqrt(max(linear**2 + 8 * number * lost * difference * (1 - difference), 0.0))
        only_first = (root - linear) / (4 * number)
        variance = number * (2 * only_first + difference * (1 - difference))
        deviation = gained - lost - number * difference
        return deviation / math.sqrt(max(variance, TOLERANCE)) - NORMAL_QUANTILE

    estimate = (gained - lost) / number
    if excess(-1 + TOLERANCE) <= 0:
        return -1.0
    return float(root_scalar(excess, bracket=(-1 + TOLERANCE, min(estimate, 1 - TOLERANCE))).root)
