"""Shows a run from its files while it trains, for `vlm watch`. Needs only the files, neither torch nor the process: the
run may be on another machine whose disk is mounted.
"""

import math
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vlm.config.shown import printable
from vlm.runs.files import text_at
from vlm.runs.holder import Holder, has_ended
from vlm.runs.metrics import METRICS_FILE
from vlm.runs.read import read_run
from vlm.runs.status_line import (
    ACTIVE_STATES,
    ENDED_STATES,
    format_evaluation,
    format_line,
    format_seconds,
)

LOG_FILE = "run.log"
GONE = "gone"
"""The state of a run that is active according to its files, but whose process on this machine has ended."""
STALE_SECONDS = 120.0
"""If the status of an active run is older than this, in seconds, its age is shown."""
PLOT_ROWS = 10
LOG_RECORD = re.compile(r"\d{4}-\d\d-\d\d (?P<time>\d\d:\d\d:\d\d),\d+ (?P<level>[A-Z]+) [\w.]+: ")
PROGRESS_RECORD = re.compile(r" INFO vlm\.[\w.]+\.progress_line: ")
"""Progress lines in the log, which are already shown above it."""
BRAILLE = 0x2800
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The dots of a braille character: by column, from the top."""


@dataclass(frozen=True)
class LiveRun:
    """The content of a run's files at one moment.

    Attributes:
        folder: the run directory.
        status: its `status.json`; empty for runs of earlier versions.
        lines: its `metrics.jsonl`: the numbers of each log, and its step.
        log: the last lines of its `run.log`.
        seen_at: the moment, in seconds since 1970.
    """

    folder: Path
    status: Mapping[str, object]
    lines: Sequence[Mapping[str, float]]
    log: Sequence[str]
    seen_at: float

    @property
    def state(self) -> str:
        """The state of the run: one of `status.json`, `gone`, or `unknown`."""
        state = self.status.get("state")
        if not isinstance(state, str) or state not in (*ACTIVE_STATES, *ENDED_STATES):
            return "unknown"
        return GONE if state in ACTIVE_STATES and self._has_gone() else state

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in (*ENDED_STATES, GONE)

    @property
    def age(self) -> float | None:
        """How old the status is, in seconds."""
        updated = self.status.get("updated_at")
        return max(0.0, self.seen_at - updated) if isinstance(updated, int | float) else None

    def _has_gone(self) -> bool:
        pid = self.status.get("pid")
        return isinstance(pid, int) and pid > 0 and has_ended(Holder(text_at(self.status, "host"), pid, 0.0))


def read_live_run(folder: Path, num_log_lines: int = 8) -> LiveRun:
    """Read the files of a run directory, which may also be named by its folder `final`.

    Raises:
        ValueError: the folder is not that of a run.
    """
    run = read_run(folder)
    lines = [
        {name: value for name, value in line.items() if isinstance(value, int | float)}
        for line in run.files.json_lines(METRICS_FILE)
        if isinstance(line.get("step"), int)
    ]
    log = _last_lines(run.files.tail(LOG_FILE), num_log_lines)
    return LiveRun(run.path, run.status, lines, log, time.time())


def _last_lines(log: str, number: int) -> list[str]:
    """Return the last lines of a log, printable."""
    lines = (_shorten(line) for line in log.splitlines() if line and not PROGRESS_RECORD.search(line))
    return [printable(line, single_line=True) for line in deque(lines, number)]


def _shorten(line: str) -> str:
    """Return a log line with only the time of day before its text, and its level unless it is a note."""
    found = LOG_RECORD.match(line)
    if found is None:
        return line
    level = "" if found["level"] == "INFO" else f"{found['level'].lower()}: "
    return f"{found['time']}  {level}{line[found.end() :]}"


def render(run: LiveRun, width: int = 100, height: int | None = None) -> str:
    """Return the view of a run.

    Args:
        run: the run.
        width: the number of columns.
        height: the number of rows; the log gets the remaining ones. None: no limit, and whole lines of the log.
    """
    shown = [*_render_head(run, width), *_render_losses(run.lines, width)]
    evaluations = [line for line in run.lines if any(name.startswith("eval_") for name in line)]
    if evaluations:
        last = evaluations[-1]
        metrics = {name: value for name, value in last.items() if name.startswith("eval_")}
        shown += ["", *_wrap(format_evaluation(int(last["step"]), metrics), width)]
    log = list(run.log)
    if height is not None:
        log = log[-max(height - len(shown) - 3, 0) :] if height - len(shown) > 3 else []
    if log:
        shown += ["", *(log if height is None else (_cut(line, width) for line in log))]
    return "\n".join(shown)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _render_head(run: LiveRun, width: int) -> list[str]:
    name = printable(str(run.folder), single_line=True)
    state = describe_state(run)
    lines = [f"{name}  {state}"] if len(name) + len(state) + 2 <= width else [name, state]
    message = run.status.get("message")
    if isinstance(message, str) and message:
        lines.append(printable(message, single_line=True))
    values = dict(run.status) or _status_from_metrics(run.lines)
    step, steps = values.get("step"), values.get("max_steps")
    if isinstance(step, int) and isinstance(steps, int) and steps > 0:
        lines.append(draw_bar(step / steps, min(width - 8, 60)))
    if isinstance(step, int):
        if run.has_ended:
            values["seconds_left"] = None
        lines += _wrap(format_line(values), width)
    return [line[:width] for line in lines]


def describe_state(run: LiveRun) -> str:
    """Return the state of the run, and the age of its status if that matters."""
    age, state = run.age, run.state
    host = run.status.get("host")
    where = f" on {printable(host, single_line=True)}" if isinstance(host, str) else ""
    if state == GONE:
        return f"ended without reporting why: its process{where} no longer exists; run.log has its last lines"
    if state == "unknown":
        return "state unknown: it has no status.json"
    if state in ENDED_STATES or age is None:
        return state
    if age > STALE_SECONDS:
        return f"{state}{where}, but it has written nothing for {format_seconds(age)}"
    return f"{state}{where}, {format_seconds(age)} ago"


def _status_from_metrics(lines: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """Return the values of the last log in the form of `status.json`, for runs without a status."""
    logs = [line for line in lines if "loss" in line]
    if not logs:
        return {}
    last, prefix = logs[-1], "learning_rate/"
    return {
        "step": last["step"],
        "epoch": last.get("epoch"),
        "loss": last["loss"],
        "mfu": last.get("mfu"),
        "tokens_per_second": last.get("tokens_per_second"),
        "waiting_share": last.get("data_wait_share"),
        "learning_rates": {name.removeprefix(prefix): rate for name, rate in last.items() if name.startswith(prefix)},
    }


def draw_bar(share: float, width: int) -> str:
    """Return a bar of a share from 0 to 1, with the share in per cent."""
    share = min(max(share, 0.0), 1.0)
    filled = int(share * width)
    return f"{'█' * filled}{'░' * (width - filled)} {share:.0%}"


def _wrap(line: str, width: int) -> list[str]:
    """Wrap a line of fields, separated by two blanks, into lines of at most this many columns."""
    lines = [""]
    for field in line.split("  "):
        longer = f"{lines[-1]}  {field}" if lines[-1] else field
        lines = [*lines[:-1], longer] if len(longer) <= width else [*lines, field]
    return lines


def _render_losses(lines: Sequence[Mapping[str, float]], width: int) -> list[str]:
    """Return a plot of the training loss, `o` where it was evaluated; nothing for fewer than two losses."""
    training = [(line["step"], line["loss"]) for line in lines if math.isfinite(line.get("loss", math.nan))]
    evaluation = [(line["step"], line["eval_loss"]) for line in lines if math.isfinite(line.get("eval_loss", math.nan))]
    if len(training) < 2:
        return []
    legend = "loss" + (", o: evaluation" if evaluation else "")
    return ["", legend, *plot(training, evaluation, max(width - 12, 20), PLOT_ROWS)]


def plot(
    curve: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float]], width: int, rows: int
) -> list[str]:
    """Return the lines of a plot: a curve in braille dots, marks as `o`, and labels of both axes.

    Args:
        curve: points of steps and values; at least two steps.
        marks: further points.
        width: columns of the plot itself.
        rows: its rows.
    """
    values = [value for _, value in (*curve, *marks)]
    low, high = min(values), max(values)
    height = (high - low) or 1.0
    first, last = min(step for step, _ in curve), max(step for step, _ in curve)
    length = (last - first) or 1.0
    cells = [[0] * width for _ in range(rows)]
    for column, value in _resample(curve, first, length, 2 * width):
        dot = round((high - value) / height * (4 * rows - 1))
        cells[dot // 4][column // 2] |= DOTS[column % 2][dot % 4]
    drawn = [[chr(BRAILLE + cell) if cell else " " for cell in row] for row in cells]
    for step, value in marks:
        if first <= step <= last:
            row = round((high - value) / height * (rows - 1))
            drawn[row][min(int((step - first) / length * width), width - 1)] = "o"
    labels = {0: f"{high:.4g}", rows - 1: f"{low:.4g}"}
    lines = [f"{labels.get(row, ''):>8} │{''.join(cells).rstrip()}" for row, cells in enumerate(drawn)]
    ends = f"{first:,.0f}", f"step {last:,.0f}"
    return [*lines, f"{'':8} └{'─' * width}", f"{'':10}{ends[0]}{ends[1]:>{width - len(ends[0])}}"]


def _resample(
    curve: Sequence[tuple[float, float]], first: float, length: float, columns: int
) -> Iterator[tuple[int, float]]:
    """Yield a value for each column: the mean of its points, between them a straight line."""
    sums: dict[int, list[float]] = {}
    for step, value in curve:
        sums.setdefault(min(int((step - first) / length * (columns - 1)), columns - 1), []).append(value)
    points = sorted((column, sum(values) / len(values)) for column, values in sums.items())
    for (column, value), (next_column, next_value) in pairwise(points):
        for between in range(column, next_column):
            share = (between - column) / (next_column - column)
            yield between, value + share * (next_value - value)
    yield points[-1]


def summarize(run: LiveRun) -> str:
    """Return a run in one line, for output that is no terminal."""
    values = dict(run.status) or _status_from_metrics(run.lines)
    line = format_line(values) if isinstance(values.get("step"), int) else ""
    return f"{run.state}  {line}".rstrip()
