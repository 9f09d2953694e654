"""Reads a run from its directory, and finds the runs below a folder.

`read_run` opens no file: each attribute of `RunDirectory` reads its files on first access, so that a list of hundreds
of runs reads only a few small files of each. Nothing raises because of a file's content, see `files.py`.
"""

import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.config.secrets import mask, mask_settings
from vlm.runs.durations import seconds_of_starts
from vlm.runs.evaluations import Evaluation, read_evaluations
from vlm.runs.files import (
    MEGABYTE,
    Folder,
    JsonObject,
    as_number,
    flatten,
    list_at,
    mapping_at,
    number_at,
    text_at,
)
from vlm.runs.holder import is_held
from vlm.runs.metrics import METRICS_FILE, Metrics, read_last_metrics, read_metrics
from vlm.runs.samples import Answer, read_samples
from vlm.runs.status_line import ACTIVE_STATES, DONE, ENDED_STATES, FAILED, STATUS_FILE, TRAINING

if TYPE_CHECKING:
    from vlm.runs.evaluated_records import EvaluatedRecords

CONFIG_FILE, COMMAND_FILE, VERSIONS_FILE, DATA_FILE = "config.yaml", "command.txt", "versions.json", "data.json"
PARTS_FILE, REPORT_FILE = "parts.json", "report.html"
FINAL_FOLDER, BEST_FOLDER = "final", "best"
RUN_FILES = (COMMAND_FILE, CONFIG_FILE, METRICS_FILE)
"""Files of which a run has at least two; any other folder may have one of them by chance."""

MAX_RUN_DEPTH = 4
"""How deep below a folder runs are searched for; those of a sweep are one level deeper."""

UNFINISHED = "not finished"
STATES = (*ACTIVE_STATES, *ENDED_STATES, UNFINISHED)
"""The states of a run; `not finished` is a run of an earlier version that ended without a result, or runs elsewhere."""


@dataclass(frozen=True)
class Change:
    """What changed with a later start of a run.

    Attributes:
        step: the step that the run was resumed from.
        time: when, as ISO 8601.
        values: key -> its old and new value.
    """

    step: int
    time: str
    values: dict[str, tuple[object, object]]


class RunDirectory:
    """A run as recorded in its directory; unknown values are empty or None.

    Attributes:
        path: the run directory.
        name: its path below the folder that was searched, or its own name.
        files: its files, read within bounds; `files.damaged` names those that could not be read, and why.
    """

    def __init__(self, path: Path, name: str | None = None):
        self.path, self.name = path, name or path.name or path.resolve().name
        self.files = Folder(path)
        self._records: dict[int, EvaluatedRecords | None] = {}

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    # What was run

    @cached_property
    def config(self) -> JsonObject:
        """The configuration as the run began, without secrets; changes at resume are in `changes`."""
        return mask_settings(self.files.yaml(CONFIG_FILE))

    @cached_property
    def settings(self) -> dict[str, object]:
        """The configuration as dotted keys with their present values, including changes at resume."""
        now = {key: values[1] for change in self.changes for key, values in change.values.items()}
        settings = flatten(self.config)
        return settings | {key: value for key, value in now.items() if key in settings}

    @cached_property
    def commands(self) -> list[str]:
        """The command of each start, without secrets; the first is the run's, the others resumed it."""
        return [mask(line) for line in self.files.text(COMMAND_FILE, MEGABYTE).splitlines() if line.strip()]

    @cached_property
    def recipe(self) -> str | None:
        """The configuration that the first command named with `-cn`."""
        words = _split(self.commands[0]) if self.commands else []
        named = [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("-cn", "--config-name")]
        return named[-1] if named else None

    @cached_property
    def overrides(self) -> dict[str, str]:
        """Key -> value of what the first command set, `trainer.output_dir` left out."""
        words = _split(self.commands[0]) if self.commands else []
        pairs = (word.lstrip("+~").partition("=") for word in words if "=" in word and not word.startswith("-"))
        return {key: value for key, _, value in pairs if key != "trainer.output_dir"}

    @cached_property
    def versions(self) -> JsonObject:
        """`versions.json`: Python, packages, devices, world size, git revision."""
        return self.files.json(VERSIONS_FILE)

    @cached_property
    def data(self) -> JsonObject:
        """`data.json`: role -> counts, and its sources."""
        return self.files.json(DATA_FILE)

    @cached_property
    def parts(self) -> list[JsonObject]:
        """The model's parts: name, source, numbers of parameters, rate; runs of earlier versions have none."""
        return [mapping_at(part) for part in list_at(self.files.json(PARTS_FILE), "parts")]

    @cached_property
    def changes(self) -> list[Change]:
        """What changed at later starts, in order."""
        return list(_parse_changes(self.files.json_lines("changes.jsonl", MEGABYTE)))

    @cached_property
    def record(self) -> JsonObject:
        """`run.json` of the finished model: fingerprints of configuration, data and code."""
        return Folder(self.path / FINAL_FOLDER).json("run.json")

    # How it went

    @cached_property
    def metrics(self) -> Metrics:
        """All logs as columns."""
        return read_metrics(self.files)

    @cached_property
    def last_metrics(self) -> Metrics:
        """The end of the log with the last evaluation; enough for a list."""
        return read_last_metrics(self.files)

    def records_at(self, step: int) -> "EvaluatedRecords | None":
        """Return what the evaluation at a step found of each record; None if that was not kept."""
        if step not in self._records:
            from vlm.runs import evaluated_records as kept  # numpy comes with it, which no list needs

            self._records[step] = kept.read_evaluated_records(self.files, kept.records_file(step))
        return self._records[step]

    @cached_property
    def status(self) -> JsonObject:
        """`status.json`, which a run keeps up to date; runs of earlier versions have none."""
        return self.files.json(STATUS_FILE)

    @cached_property
    def is_alive(self) -> bool:
        """Whether the run's process is alive, as far as this machine can know."""
        return is_held(self.path)

    @cached_property
    def state(self) -> str:
        """One of `STATES`."""
        told = self.status.get("state")
        if self.is_alive:
            return told if isinstance(told, str) and told in ACTIVE_STATES else TRAINING
        if told in ENDED_STATES:
            return str(told)
        if self.final is not None:
            return DONE
        return FAILED if told in ACTIVE_STATES else UNFINISHED

    @cached_property
    def step(self) -> int:
        """The last known step; 0 before the first."""
        told = number_at(self.status, "step") or 0
        return max(int(told), self.last_metrics.last_step)

    @cached_property
    def max_steps(self) -> int | None:
        """The number of steps of the whole run, if it is known."""
        for found in (
            number_at(self.status, "max_steps"),
            number_at(self.record, "progress", "max_steps"),
            as_number(self.settings.get("trainer.max_steps")),
        ):
            if found is not None and found > 0:
                return int(found)
        return None

    @cached_property
    def epoch(self) -> float | None:
        """The number of epochs trained, with a fraction."""
        return self.last_metrics.last("epoch")

    @cached_property
    def progress(self) -> float | None:
        """The completed share of the run, from 0 to 1; None if it is unknown."""
        if self.state == DONE:
            return 1.0
        if self.max_steps is not None:
            return min(self.step / self.max_steps, 1.0)
        epochs = as_number(self.settings.get("trainer.num_train_epochs"))
        return min(self.epoch / epochs, 1.0) if epochs and self.epoch is not None else None

    @cached_property
    def started(self) -> float | None:
        """When the run last started, in seconds since 1970; of runs of earlier versions, when it first did."""
        told = [
            number_at(self.status, "started_at"),
            self.files.modified(CONFIG_FILE),
            self.files.modified(COMMAND_FILE),
            self.files.modified(METRICS_FILE),
        ]
        return next((moment for moment in told if moment is not None), None)

    @cached_property
    def seconds(self) -> float | None:
        """How long the run has trained, in seconds, over all its starts.

        The last one lasts until now if it is alive, else until its last sign of life.
        """
        if self.started is None:
            return None
        if self.is_alive:
            return seconds_of_starts(self.status | {"started_at": self.started}, time.time())
        if number_at(self.status, "updated_at") is not None:
            return seconds_of_starts(self.status | {"started_at": self.started})
        if len(self.commands) < 2 and (measured := self.last_metrics.last("train_runtime")) is not None:
            return measured
        last = self.files.modified(METRICS_FILE)
        return None if last is None else max(0.0, last - self.started)

    @cached_property
    def speed(self) -> JsonObject:
        """`speed.json`: tokens, samples and operations per second of the last call, padding, waiting, memory."""
        return self.files.json("speed.json")

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second: of the last logged steps while the run goes on, then of its whole last call."""
        whole = None if self.state in ACTIVE_STATES else number_at(self.speed, "tokens_per_second")
        return self.last_metrics.last("tokens_per_second") if whole is None else whole

    @property
    def peak_memory(self) -> float | None:
        """Peak memory of a device in GiB: of the last call if it has ended, else as last logged."""
        whole = None if self.state in ACTIVE_STATES else number_at(self.speed, "peak_memory_gib")
        return self.last_metrics.last("peak_memory_gib") if whole is None else whole

    @cached_property
    def samples(self) -> dict[int, list[Answer]]:
        """Step -> the model's sample answers."""
        return read_samples(self.files)

    @cached_property
    def skipped(self) -> list[JsonObject]:
        """Records that were left out: `record`, `id`, `reason`, `file`, `source`, `policy`."""
        return self.files.json_lines("skipped.jsonl")

    @cached_property
    def guard(self) -> list[JsonObject]:
        """Steps at which a guard found something."""
        return self.files.json_lines("guard.jsonl")

    # What came out

    @cached_property
    def final(self) -> Path | None:
        """The folder of the finished model; None if the run has none."""
        folder = self.path / FINAL_FOLDER
        return folder if is_checkpoint(folder) else None

    @cached_property
    def best(self) -> Path | None:
        """The folder of the model of the best evaluation; None if the run has none."""
        folder = self.path / BEST_FOLDER
        return folder if is_checkpoint(folder) else None

    @cached_property
    def checkpoints(self) -> list[int]:
        """The steps of whole checkpoints: those with a manifest, or with the mark of earlier versions; ascending."""
        marks = [mark for name in ("manifest.json", "complete") for mark in self.path.glob(f"checkpoint-*/{name}")]
        numbers = {mark.parent.name.removeprefix("checkpoint-") for mark in marks}
        return sorted(int(number) for number in numbers if number.isdigit())

    @cached_property
    def heads(self) -> JsonObject:
        """`scores.json`: set of records -> head -> records, note, threshold, scores, baseline."""
        return self.files.json("scores.json")

    @cached_property
    def head_resamples(self) -> JsonObject:
        """`scores_resampled.json`: set of records -> head -> its metrics on each resample; earlier runs have none."""
        return self.files.json("scores_resampled.json")

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The results of `vlm eval` for the run's model, by name."""
        return read_evaluations(self.path, self.files)


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quotation mark without its end
        return command.split()


def _parse_changes(lines: list[JsonObject]) -> Iterator[Change]:
    for line in lines:
        values = {
            key: (pair[0], pair[1])
            for key, pair in mapping_at(line, "changes").items()
            if isinstance(pair, list) and len(pair) == 2
        }
        yield Change(int(number_at(line, "step") or 0), text_at(line, "time"), values)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a model."""
    return (folder / "config.json").is_file()


def is_run_directory(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return sum((folder / name).is_file() for name in RUN_FILES) >= 2 or (folder / STATUS_FILE).is_file()


def read_run(folder: Path, name: str | None = None) -> RunDirectory:
    """Return the run of a directory.

    Args:
        folder: a run directory, or its folder `final` or a checkpoint in it.
        name: the name of the run; defaults to the folder's name.

    Raises:
        ValueError: the folder is not a run directory.
    """
    for found in (folder, folder.resolve().parent):
        if is_run_directory(found):
            return RunDirectory(found, name)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; vlm runs lists the runs below outputs/")
    inside = next(find_run_folders(folder), None)
    hint = f"runs are in it, such as {inside}" if inside else "a run directory has config.yaml and metrics.jsonl"
    raise ValueError(f"{folder}: this is not a run directory; {hint}")


def find_runs(parent: Path) -> list[RunDirectory]:
    """Return the runs below a folder, the newest first; or the folder itself if it is a run directory."""
    if is_run_directory(parent):
        return [RunDirectory(parent)]
    folders = find_run_folders(parent)
    runs = [RunDirectory(folder, folder.relative_to(parent).as_posix()) for folder in folders]
    return sorted(runs, key=lambda run: run.started or 0.0, reverse=True)


def find_run_folders(parent: Path, depth: int = MAX_RUN_DEPTH) -> Iterator[Path]:
    """Yield the run directories below a folder, by name; nothing within a run directory or a hidden folder."""
    try:
        entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        try:
            if entry.name.startswith(".") or not entry.is_dir():
                continue
        except OSError:
            continue
        folder = parent / entry.name
        if is_run_directory(folder):
            yield folder
        elif depth > 1:
            yield from find_run_folders(folder, depth - 1)
