"""Results of benchmarks: ratios of medians measured in one run, as a table, JSON and a plot."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from vlm.data.processes import num_cores

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A claim: how one variant compares with another at the same work.

    Attributes:
        name: the name of the comparison.
        ratio: the measured ratio.
        target: its target.
        better: `higher` or `lower`.
        medians: variant -> median of its measurements.
        spread: variant -> its least and greatest measurement.
        unit: the unit of the measurements.
    """

    name: str
    ratio: float
    target: float
    better: str
    medians: dict[str, float]
    spread: dict[str, tuple[float, float]]
    unit: str

    @property
    def holds(self) -> bool:
        """Whether the target is met."""
        return self.ratio >= self.target if self.better == "higher" else self.ratio <= self.target


def compared(
    name: str, ours: Sequence[float], theirs: Sequence[float], labels: tuple[str, str], unit: str, target: float,
    better: str = "higher",
) -> Row:  # fmt: skip
    """Return a row for measurements of two variants; the ratio is ours over theirs."""
    values = dict(zip(labels, (list(ours), list(theirs)), strict=True))
    medians = {label: statistics.median(measured) for label, measured in values.items()}
    spread = {label: (min(measured), max(measured)) for label, measured in values.items()}
    return Row(name, medians[labels[0]] / medians[labels[1]], target, better, medians, spread, unit)


def paired(
    name: str, ours: Sequence[float], theirs: Sequence[float], labels: tuple[str, str], unit: str, target: float,
    better: str = "higher",
) -> Row:  # fmt: skip
    """Return a row for measurements of the same pieces of work; the ratio is the median of ours over theirs."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return replace(compared(name, ours, theirs, labels, unit, target, better), ratio=statistics.median(ratios))


def below(name: str, measured: Sequence[float], label: str, unit: str, limit: float) -> Row:
    """Return a row for a figure that has to stay below a limit; the ratio is its share of the limit."""
    median = statistics.median(measured)
    return Row(name, median / limit, 1.0, "lower", {label: median}, {label: (min(measured), max(measured))}, unit)


def report(name: str, rows: Sequence[Row], notes: Mapping[str, Any] | None = None) -> None:
    """Print the rows, and write `results/NAME.json` and `results/NAME.png`.

    Args:
        name: the name of the benchmark.
        rows: its claims.
        notes: further figures without a target.
    """
    print(f"\n{'what':<58}{'ratio':>8}{'target':>9}   medians (least to greatest)")
    for row in rows:
        sign = "≥" if row.better == "higher" else "≤"
        parts = [f"{k} {v:,.4g} ({row.spread[k][0]:,.4g}–{row.spread[k][1]:,.4g})" for k, v in row.medians.items()]
        mark = " " if row.holds else "!"
        print(f"{row.name:<58}{row.ratio:>8.2f}{sign:>3}{row.target:>6.2f} {mark} {', '.join(parts)} {row.unit}")
    for key, value in (notes or {}).items():
        print(f"{key}: {value:,.4g}" if isinstance(value, float) else f"{key}: {value}")
    RESULTS.mkdir(exist_ok=True)
    machine = {"cores": num_cores(), "python": platform.python_version(), "system": platform.system()}
    machine |= {"torch": torch.__version__}
    machine |= {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    content = {"machine": machine, "rows": [asdict(row) for row in rows], **({"notes": notes} if notes else {})}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _draw(rows, RESULTS / f"{name}.png")
    print(f"\nWritten: {RESULTS / name}.json and .png")


def _draw(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(9, 1 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.name}\n({row.better} is better)" for row in rows]
    axes.barh(names, [row.ratio for row in rows], color=["#2a9d5c" if row.holds else "#c0392b" for row in rows])
    for index, row in enumerate(rows):
        axes.plot([row.target] * 2, [index - 0.4, index + 0.4], color="black", linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("ratio; the dashed line is the target")
    figure.savefig(path, dpi=110)
