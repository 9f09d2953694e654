"""The figure of what moved: the difference of each group with its interval."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.evaluation.comparison.changes import LOSS, Change
from vlm.evaluation.comparison.replay import name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {1: "#1a7f37", 0: "#6e7781", -1: "#cf222e"}
"""Direction of a change -> its colour: better, not clear, worse."""
FIGURE_FILE = "moved.png"
MOST_ROWS = 40
"""The largest number of groups that are drawn."""


def draw_changes(changes: Sequence[Change], path: Path) -> None:
    """Plot the differences of answers and of losses, after minus before, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, and not needed before models are compared

    scores = [change for change in changes if change.measure != LOSS][:MOST_ROWS]
    losses = [change for change in changes if change.measure == LOSS][:MOST_ROWS]
    height = 1.6 + 0.27 * max(len(scores), len(losses), 1)
    figure = Figure(figsize=(13, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, scores, "answers: change of the metric (right is better)")
    _draw(right, losses, "loss of the replies: change in nats per token (left is better)")
    figure.suptitle("What changed, with 95% intervals: green better, red worse, grey unclear", fontsize=10)
    figure.savefig(path, dpi=110)


def _draw(axes: "Axes", changes: Sequence[Change], title: str) -> None:
    """Draw a row for each change, the first one above."""
    labels = []
    for place, change in enumerate(changes):
        difference = change.difference
        colour = COLOURS[change.direction]
        value = difference.value or 0.0
        if difference.low is not None and difference.high is not None:
            axes.plot([difference.low, difference.high], [place, place], color=colour, linewidth=2)
        filled = colour if not change.is_blank else "white"
        axes.plot([value], [place], "o", markeredgecolor=colour, markerfacecolor=filled, markersize=5)
        measure = "" if change.measure in (LOSS, "right") else f" {change.measure}"
        labels.append(f"{name_of(change)}{measure}{', blank images' if change.is_blank else ''} ({change.num_records})")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(changes)), labels, fontsize=8)
    axes.set_ylim(len(changes) - 0.5, -0.5)
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
