"""The logs of a run as columns: for each metric, its steps and values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap

from vlm.runs.files import Folder, JsonObject, as_number, parse_line
from vlm.runs.status_line import INTERVAL_SUFFIX

METRICS_FILE = "metrics.jsonl"
MAX_LINE_BYTES = 256 * 1024


@dataclass
class Column:
    """The values of one metric.

    Attributes:
        steps: the steps at which it has a value, in the order of the log.
        values: its values there; finite.
        num_undefined: how often it was logged as infinite or NaN.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    num_undefined: int = 0

    @property
    def last(self) -> float | None:
        """The last value; None if there is none."""
        return self.values[-1] if self.values else None

    def points(self) -> list[tuple[int, float]]:
        """Return steps and values as pairs."""
        return list(zip(self.steps, self.values, strict=True))


class Metrics(Mapping[str, Column]):
    """Name of a metric -> its column; `epoch` is one of them.

    Attributes:
        last_step: the last step that was logged; 0 before the first.
    """

    def __init__(self, lines: Iterable[JsonObject] = ()):
        self.last_step = 0
        self._columns: dict[str, Column] = {}
        for line in lines:
            step = as_number(line.get("step"))
            if step is None:
                continue
            self.last_step = max(self.last_step, int(step))
            for name, value in line.items():
                self._add(name, int(step), value)

    def _add(self, name: str, step: int, value: object) -> None:
        if name == "step":
            return
        column, number = self._columns.setdefault(name, Column()), as_number(value)
        if number is None:
            column.num_undefined += 1
        else:
            column.steps.append(step)
            column.values.append(number)

    def __getitem__(self, name: str) -> Column:
        return self._columns[name]

    def __iter__(self):
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def last(self, name: str) -> float | None:
        """Return the last value of a metric; None if it has none."""
        column = self._columns.get(name)
        return column.last if column is not None else None

    def half_widths(self, name: str) -> dict[int, float]:
        """Return step -> half the width of a metric's 95% interval there, for those that were logged with one."""
        column = self._columns.get(f"{name}{INTERVAL_SUFFIX}")
        return {} if column is None else dict(column.points())

    def last_half_width(self, name: str) -> float | None:
        """Return half the width of the 95% interval of a metric's last value; None if it was logged without one."""
        column = self._columns.get(name)
        return None if column is None or not column.steps else self.half_widths(name).get(column.steps[-1])

    def last_values(self) -> dict[str, float]:
        """Return metric -> its last value, for those that have one."""
        return {name: column.values[-1] for name, column in self._columns.items() if column.values}

    def starting_with(self, prefix: str) -> dict[str, Column]:
        """Return the columns whose names start with a prefix, by the rest of the name."""
        return {name.removeprefix(prefix): column for name, column in self.items() if name.startswith(prefix)}


def read_metrics(folder: Folder) -> Metrics:
    """Return all logs of a run."""
    return Metrics(folder.json_lines(METRICS_FILE))


def read_last_metrics(folder: Folder) -> Metrics:
    """Return the end of a run's log with its last evaluation, which is enough for a list, however long the log is."""
    *lines, _ = folder.tail(METRICS_FILE).split("\n")
    objects = [found for line in lines if (found := parse_line(line)) is not None]
    if not any(name.startswith("eval_") for found in objects for name in found):
        objects[:0] = [evaluation] if (evaluation := _find_last(folder, b'"eval_')) else []
    return Metrics(objects)


def _find_last(folder: Folder, word: bytes) -> JsonObject | None:
    """Return the last line of the log with a word in it; None if there is none."""
    try:
        with (
            (folder.path / METRICS_FILE).open("rb") as file,
            mmap(file.fileno(), 0, access=ACCESS_READ) as log,
        ):
            place = log.rfind(word)
            if place < 0:
                return None
            start = log.rfind(b"\n", max(0, place - MAX_LINE_BYTES), place) + 1
            end = log.find(b"\n", place, place + MAX_LINE_BYTES)
            return None if end < 0 else parse_line(log[start:end].decode("utf-8", errors="replace"))
    except (OSError, ValueError):  # missing, or empty
        return None
