"""Tables of runs: a value for each column, sorting and filters, for `vlm runs`."""

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from tabulate import tabulate

from vlm.config.short_names import describe_values, show_value
from vlm.runs.differences import unusual_settings
from vlm.runs.files import text_at
from vlm.runs.read import RunDirectory

Value = str | float | None

DEFAULT_COLUMNS = ("name", "state", "step", "loss", "eval_loss", "tokens_per_second", "duration", "differs")
METRIC_COLUMNS = ("loss", "eval_loss", "tokens_per_second")
TITLES = {"eval_loss": "eval", "tokens_per_second": "tokens/s"}
"""Column -> its title, if this differs from its name."""
FIELDS: Mapping[str, Callable[[RunDirectory], Value]] = {
    "name": lambda run: run.name,
    "path": lambda run: str(run.path),
    "recipe": lambda run: run.recipe,
    "state": lambda run: run.state,
    "step": lambda run: run.step,
    "max_steps": lambda run: run.max_steps,
    "progress": lambda run: run.progress,
    "message": lambda run: text_at(run.status, "message") or None,
    "duration": lambda run: run.seconds,
    "started": lambda run: run.started,
    "tokens_per_second": lambda run: run.tokens_per_second,
}
"""Columns that are neither metrics nor settings -> how they are read."""
OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
TITLE_PADDING = 2
"""Blanks that tabulate adds to a title."""
MIN_WIDTH = 24
"""Characters that the longest column keeps, however narrow the terminal is."""


@dataclass(frozen=True)
class Filter:
    """A condition such as `eval_loss<1.2` or `state=done`."""

    key: str
    compare: Callable[[float, float], bool]
    value: str

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """Parse a condition.

        Raises:
            ValueError: the text is not a condition.
        """
        match = re.fullmatch(r"\s*([^<>=!]+?)\s*(<=|>=|!=|<|>|==?)\s*(.*?)\s*", text)
        if match is None:
            raise ValueError(
                f"--filter {text!r}: write a key, one of {' '.join(OPERATORS)}, and a value: 'eval_loss<1.2'"
            )
        return cls(match[1], OPERATORS[match[2].replace("==", "=")], match[3])

    def matches(self, value: Value) -> bool:
        """Return whether a value meets the condition; a missing value meets only `!=`."""
        if value is None:
            return self.compare is operator.ne
        try:
            return self.compare(float(value), float(self.value))
        except ValueError:
            if self.compare not in (operator.eq, operator.ne):
                return False
            return (str(value) == self.value) == (self.compare is operator.eq)


class RunTable:
    """Runs with the values of their columns: fields, metrics (the last value), settings, also by their last word."""

    def __init__(self, runs: Sequence[RunDirectory]):
        self.runs = list(runs)
        self._metrics = {*METRIC_COLUMNS, *(name for run in runs for name in run.last_metrics)}
        self._differs = dict(zip(map(id, self.runs), unusual_settings(self.runs), strict=True))

    def value(self, run: RunDirectory, key: str) -> Value:
        """Return the value of a column for a run; None if the run has none."""
        if key == "differs":
            return describe_values(self._differs[id(run)])
        if key in FIELDS:
            return FIELDS[key](run)
        if metric := self._find_metric(key):
            return run.last_metrics.last(metric)
        settings = run.settings
        name = key if key in settings else next((name for name in settings if name.endswith(f".{key}")), None)
        return None if name is None else _plain(settings[name])

    def text(self, run: RunDirectory, key: str) -> str:
        """Return the value of a column as text, a metric's with half the width of its 95% interval."""
        shown, metric = format_value(key, self.value(run, key)), self._find_metric(key)
        if key in FIELDS or metric is None or (width := run.last_metrics.last_half_width(metric)) is None:
            return shown
        return f"{shown} ± {width:.2g}"

    def _find_metric(self, key: str) -> str | None:
        """Return the logged name of a metric, which may be given without `eval_`; None if no run has it."""
        return next((name for name in (key, f"eval_{key}") if name in self._metrics), None)

    def check_keys(self, keys: Sequence[str]) -> None:
        """Refuse a column that no run has, and the last word of several settings.

        Raises:
            ValueError: with columns of a similar name, or the settings that it could be.
        """
        settings = dict.fromkeys(name for run in self.runs for name in run.settings)
        known = {"differs", *FIELDS, *self._metrics, *settings}
        for key in keys:
            if key in known or f"eval_{key}" in known:
                continue
            ending = [name for name in settings if name.endswith(f".{key}")]
            if len(ending) > 1:
                raise ValueError(f"{key}: several settings end with it, {', '.join(ending[:4])}; write the whole key")
            if ending:
                continue
            names = sorted(known | {name.rpartition(".")[2] for name in known})
            near = difflib.get_close_matches(key, names, 3)
            raise ValueError(
                f"{key}: no run has such a column; "
                + (
                    f"similar: {', '.join(near)}"
                    if near
                    else "columns are fields (name, state, step, duration …), logged metrics and settings"
                )
            )

    def select(self, filters: Sequence[Filter], sort: str | None, *, reverse: bool = False) -> list[RunDirectory]:
        """Return the runs that meet all conditions, sorted by a column; runs without a value come last."""
        self.check_keys([*(one.key for one in filters), *([sort] if sort else [])])
        runs = [run for run in self.runs if all(one.matches(self.value(run, one.key)) for one in filters)]
        if sort is None:
            return runs[::-1] if reverse else runs
        values = {id(run): self.value(run, sort) for run in runs}
        known = [run for run in runs if values[id(run)] is not None]
        known.sort(key=lambda run: _order(values[id(run)]), reverse=reverse)
        return [*known, *(run for run in runs if values[id(run)] is None)]

    def rows(self, runs: Sequence[RunDirectory], columns: Sequence[str]) -> list[dict[str, Value]]:
        """Return column -> value for each run, for JSON."""
        return [{column: self.value(run, column) for column in columns} for run in runs]

    def __str__(self) -> str:
        return self.format(self.runs, DEFAULT_COLUMNS)

    def format(self, runs: Sequence[RunDirectory], columns: Sequence[str], width: int = 0) -> str:
        """Return a table for a terminal; if it is wider than `width` (0: never), its longest column is cut."""
        texts = [[self.text(run, column) for column in columns] for run in runs]
        used = [
            at for at, column in enumerate(columns) if column in ("name", *columns[:1]) or any(row[at] for row in texts)
        ]
        titles = [TITLES.get(columns[at], columns[at].rpartition(".")[2]) for at in used]
        texts = [[row[at] for at in used] for row in texts]
        widths = [
            max(len(title) + TITLE_PADDING, *map(len, column)) for title, *column in zip(titles, *texts, strict=True)
        ]
        excess = sum(widths) + 2 * (len(widths) - 1) - width if width else 0
        if excess > 0:
            longest = widths.index(max(widths))
            most = max(MIN_WIDTH, widths[longest] - excess)
            for row in texts:
                row[longest] = row[longest] if len(row[longest]) <= most else f"{row[longest][: most - 1]}…"
        numeric = [all(_is_number(self.value(run, columns[at])) for run in runs) for at in used]
        alignment = ["right" if right else "left" for right in numeric]
        return tabulate(texts, titles, tablefmt="plain", disable_numparse=True, colalign=alignment)


def _is_number(value: Value) -> bool:
    return value is None or not isinstance(value, str)


def _order(value: Value) -> tuple[bool, float, str]:
    return (True, 0.0, value) if isinstance(value, str) else (False, float(value or 0.0), "")


def _plain(value: object) -> Value:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return show_value(value)


def format_value(column: str, value: Value) -> str:
    """Return a value for a table; empty if there is none."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if column == "duration":
        return format_duration(value)
    if column == "started":
        return f"{datetime.fromtimestamp(value):%Y-%m-%d %H:%M}"
    if column == "progress":
        return f"{value:.0%}"
    return format_number(value)


def format_number(value: float) -> str:
    """Return a number with four digits; whole numbers, and those of at least 1,000, without decimals."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: `2 d 3 h`, `5 min 20 s`, `12 s`."""
    whole = round(seconds)
    for size, unit, small, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{whole} s"
