"""Finds spikes: a loss or a gradient norm far above those of the steps before it."""

from collections import deque
from collections.abc import Sequence
from statistics import median

MIN_STEPS = 20
"""Number of earlier steps that are needed before a step can count as a spike."""
NORMAL_MAD = 1.4826
"""The standard deviation of a normal distribution, in its median absolute deviations."""
LEAST_DEVIATION = 0.02
"""The smallest deviation, as a share of the median; otherwise any change after equal values would be a spike."""


class SpikeDetector:
    """Compares the numbers of each step with those of the steps before it.

    A number is a spike if it is above the median of the last `window` steps by more than `threshold` times their
    median absolute deviation, scaled to a standard deviation (Hampel 1974). A single step hardly changes either.

    Args:
        window: number of steps that a step is compared with.
        threshold: number of deviations.
    """

    def __init__(self, window: int, threshold: float):
        self.window, self.threshold = window, threshold
        self.history: dict[str, deque[float]] = {}

    def find(self, numbers: dict[str, float]) -> str | None:
        """Return which number of a step is a spike, in words, or None; then add the step to the earlier ones."""
        spikes = [words for name, value in numbers.items() if (words := self._describe(name, value)) is not None]
        for name, value in numbers.items():
            self.history.setdefault(name, deque(maxlen=self.window)).append(value)
        return " and ".join(spikes) or None

    def restore(self, name: str, values: Sequence[float]) -> None:
        """Restore the numbers of earlier steps, the newest last."""
        self.history[name] = deque(values, maxlen=self.window)

    def _describe(self, name: str, value: float) -> str | None:
        before = self.history.get(name, ())
        if len(before) < min(MIN_STEPS, self.window):
            return None
        middle, deviation = robust_scale(list(before))
        if value <= middle + self.threshold * deviation:
            return None
        return f"the {name} {value:.4g} is {(value - middle) / deviation:.0f} deviations above the usual {middle:.4g}"


def robust_scale(values: Sequence[float]) -> tuple[float, float]:
    """Return the median of some values and their deviation from it, which is always above 0."""
    middle = median(values)
    deviation = NORMAL_MAD * median(abs(value - middle) for value in values)
    return middle, max(deviation, LEAST_DEVIATION * abs(middle), 1e-12)
