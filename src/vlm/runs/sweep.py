"""Summarises a sweep: one table, one plot, one page, and which setting is best."""

import logging
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from vlm.config.html_page import html_page
from vlm.config.short_names import short_keys, show_value
from vlm.runs.charts import Curve, draw_figure
from vlm.runs.files import as_number
from vlm.runs.html import STYLE, embed_image, section, table, text
from vlm.runs.listing import RunTable, format_value
from vlm.runs.outcome import Gap, Setting, describe_verdict, group_by_setting, metric_of, numeric_axis, rank, sign_of
from vlm.runs.read import RunDirectory, find_run_folders

log = logging.getLogger(__name__)

PAGE_FILE, PLOT_FILE = "sweep.html", "sweep.png"
MAX_CURVES = 16
"""Number of runs, the best ones, whose curves a page shows."""
DECADES = 10
"""If the largest number is at least this many times the smallest, the horizontal axis is logarithmic."""


class SweepSummary:
    """The runs of a sweep, grouped by all differing settings except the seed, with the best setting first.

    Attributes:
        folder: the folder of the sweep.
        runs: its runs.
        metric: the metric by which they are compared.
        sign: 1 if more of it is better, -1 if less is.
        settings: the settings, the best first; those without an outcome last.
        gaps: setting -> how far it is behind the best, by the setting's text.
    """

    def __init__(self, folder: Path, runs: Sequence[RunDirectory]):
        self.folder, self.runs = folder, list(runs)
        self.metric = metric_of(self.runs)
        self.sign = sign_of(self.metric, self.runs)
        settings = group_by_setting(self.runs, self.metric)
        best, gaps = rank(settings, self.sign)
        self.gaps: dict[str, Gap] = {str(gap.setting): gap for gap in gaps}
        ranked = [] if best is None else [best, *(gap.setting for gap in gaps)]
        self.settings = [*ranked, *(one for one in settings if not one.outcomes)]
        self.verdict = describe_verdict(settings, self.metric, self.sign, in_sweep=True)

    def __str__(self) -> str:
        rows = [[str(cell) for cell in row] for row in self.rows()]
        grid = tabulate([self.header(), *rows], "firstrow", tablefmt="plain", disable_numparse=True)
        return f"{grid}\n\n{self.verdict}"

    def header(self) -> list[str]:
        """Return the titles of the table's columns."""
        keys = list(self.settings[0].values) if self.settings else []
        short = short_keys(keys)
        return [*(short[key] for key in keys), self.metric, "±", "seeds", "behind the best", "states"]

    def rows(self) -> list[list[str]]:
        """Return a row for each setting."""
        return [self._row(setting) for setting in self.settings]

    def _row(self, setting: Setting) -> list[str]:
        values = [
            format_value("", number) if (number := as_number(value)) is not None else show_value(value)
            for value in setting.values.values()
        ]
        spread = setting.deviation
        if spread is None and len(setting.outcomes) == 1:
            spread = setting.outcomes[0].half_width
        states = sorted({run.state for run in setting.runs})
        return [
            *values,
            f"{setting.mean:.4g}" if setting.outcomes else "",
            "" if spread is None else f"{spread:.2g}",
            str(len(setting.outcomes)),
            _describe_gap(self.gaps.get(str(setting))),
            ", ".join(states),
        ]


def _describe_gap(gap: Gap | None) -> str:
    if gap is None:
        return ""
    text = f"{abs(gap.difference):.3g}"
    if gap.half_width is not None:
        text += f" ± {gap.half_width:.2g}" + ("" if gap.is_clear else ", within noise")
    return text


def write_sweep(folder: Path) -> SweepSummary | None:
    """Write the plot and the page of a sweep into its folder; return its summary, None if it has no runs."""
    runs = [RunDirectory(path, path.relative_to(folder).as_posix()) for path in find_run_folders(folder)]
    if not runs:
        return None
    summary = SweepSummary(folder, runs)
    draw_sweep(summary, folder / PLOT_FILE)
    (folder / PAGE_FILE).write_text(_make_page(summary), encoding="utf-8")
    return summary


def draw_sweep(summary: SweepSummary, path: Path) -> None:
    """Plot the outcomes as a PNG, each seed as a point and the mean as a line; no file without outcomes."""
    measured = [one for one in summary.settings if one.outcomes]
    if not measured:
        return
    from matplotlib.figure import Figure  # slow to import

    axis = numeric_axis(measured)
    figure = Figure(figsize=(7, 4 if axis else max(2.0, 0.9 + 0.35 * len(measured))), layout="constrained")
    axes = figure.subplots()
    places = axis[1] if axis else [float(-place) for place in range(len(measured))]
    for place, setting in zip(places, measured, strict=True):
        values = [one.value for one in setting.outcomes]
        widths = [one.half_width for one in setting.outcomes]
        error = widths[0] if len(values) == 1 else None
        if axis:
            axes.errorbar([place] * len(values), values, yerr=error, fmt="o", color="#0b62c4", alpha=0.6, capsize=3)
        else:
            axes.errorbar(values, [place] * len(values), xerr=error, fmt="o", color="#0b62c4", alpha=0.6, capsize=3)
    means = [setting.mean for setting in measured]
    if axis:
        order = sorted(range(len(places)), key=lambda at: places[at])
        axes.plot([places[at] for at in order], [means[at] for at in order], color="#0b62c4")
        if min(places) > 0 and max(places) >= DECADES * min(places):
            axes.set_xscale("log")
        axes.set(xlabel=axis[0], ylabel=summary.metric)
    else:
        axes.plot(means, places, "|", color="#c2410c", markersize=16, markeredgewidth=2)
        axes.set_yticks(places, [_cut(str(setting)) for setting in measured])
        axes.set(xlabel=summary.metric)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _cut(name: str, most: int = 48) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _make_page(summary: SweepSummary) -> str:
    order = [run for setting in summary.settings for run in setting.runs][:MAX_CURVES]
    metrics = dict.fromkeys(("loss", summary.metric, "eval_loss"))
    curves = "".join(
        draw_figure(
            name,
            [
                Curve(run.name, run.metrics[name].points(), name.startswith("eval_"), run.metrics.half_widths(name))
                for run in order
                if name in run.metrics
            ],
        )
        for name in metrics
    )
    runs = RunTable(order)
    columns = ("name", "state", "step", "loss", "eval_loss", "tokens_per_second", "duration")
    rows = [[runs.text(run, column) for column in columns] for run in summary.runs]
    image = embed_image(summary.folder / PLOT_FILE)
    plot = (
        f'<div class="plots single"><img src="{image}" alt="{text(summary.metric)} of each setting"></div>'
        if image
        else ""
    )
    header, grid = summary.header(), summary.rows()
    body = (
        f'<p class="meta">{len(summary.runs):,} runs of {text(summary.folder)}</p>'
        + section("Verdict", f"<p>{text(summary.verdict)}</p>{plot}")
        + section("Settings", table(header, grid, numeric=range(len(header) - 5, len(header) - 2)))
        + section("Curves", curves)
        + section("Runs", table(("run", *columns[1:]), rows, numeric=range(2, len(columns))))
    )
    return html_page(f"Sweep {summary.folder.name}", body, style=STYLE)


def finish_sweep(folder: Path) -> None:
    """Print the table of a sweep and write its files; errors are logged, not raised."""
    try:
        summary = write_sweep(folder)
    except Exception:  # an error in the summary must not hide the trained models
        log.exception("%s: the table of the sweep could not be written", folder)
        return
    if summary is not None:
        print(f"\n{summary}\n\nPage: {folder / PAGE_FILE}", flush=True)
