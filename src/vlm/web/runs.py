"""Runs as their directories describe them: which exist, their progress, and what they logged.

Needs neither torch nor Gradio. Everything is read from disk each time, so that a restarted page loses nothing.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Required, TypedDict

from omegaconf import OmegaConf

from vlm.checks.checkpoint_files import read_object
from vlm.web.jobs import Job, read_job

PREDICTION_MODEL_TYPE = "vlm_prediction"
"""`model_type` of checkpoints with prediction heads."""

MAX_RUN_DEPTH = 2
"""Runs lie directly below the folder of outputs, or in a folder there."""

TAIL_BYTES, TAIL_LINES = 64 * 1024, 200
"""How much of a log's end is read, and how many of its lines are shown."""

MAX_PLOT_POINTS = 1000
"""The largest number of points of a loss in a plot."""

LOSS_NAMES = {"loss": "training", "eval_loss": "evaluation", "eval_blank_loss": "evaluation, blank images"}
"""Key of a loss in `metrics.jsonl` -> its name in a plot."""


class LoggedMetrics(TypedDict, total=False):
    """A line of `metrics.jsonl`: these keys, and any others."""

    step: Required[int]
    epoch: float
    loss: float | None


class SampleAnswer(TypedDict, total=False):
    """A sample of `samples.md`; `image` is a path."""

    image: str
    question: Required[str]
    reference: str
    answer: str


@dataclass(frozen=True)
class Run:
    """A run directory."""

    folder: Path
    name: str
    """Its path below the folder of outputs."""
    started: datetime
    """When the page started the run, else when its command was written, which a run does first."""
    state: str
    """`running`, `ending` (asked to stop), `finished`, `stopped`, `failed`, or `not finished` where it was started
    elsewhere and may still be running."""
    step: int
    """The last logged step; 0 before the first."""
    loss: float | None
    """The last logged training loss."""

    @property
    def progress(self) -> float | None:
        """The completed share of `max_steps` where it is set, else of the epochs; None where it is unknown."""
        if self.state == "finished":
            return 1.0
        lines, file = last_metrics(self.folder), self.folder / "config.yaml"
        if not lines or not file.is_file():
            return None
        trainer = OmegaConf.load(file).trainer
        trainer.update(_changed_settings(self.folder))
        if trainer.max_steps is not None and trainer.max_steps > 0:
            return min(lines[-1]["step"] / trainer.max_steps, 1.0)
        if trainer.num_train_epochs and "epoch" in lines[-1]:
            return min(lines[-1]["epoch"] / trainer.num_train_epochs, 1.0)
        return None

    @property
    def is_active(self) -> bool:
        """Whether the run's process is alive."""
        return self.state in ("running", "ending")


def find_runs(outputs: Path) -> list[Run]:
    """Return the runs below a folder, the newest first."""
    runs = [read_run(folder, outputs) for folder in _run_folders(outputs, MAX_RUN_DEPTH)]
    return sorted(runs, key=lambda run: run.started, reverse=True)


def find_run(outputs: Path, name: str | None) -> Run | None:
    """Return the run of a name that `find_runs` gave; None for any other name, so that no other folder is read."""
    folders = _run_folders(outputs, MAX_RUN_DEPTH)
    return next((read_run(folder, outputs) for folder in folders if _run_name(folder, outputs) == name), None)


def _run_folders(parent: Path, depth: int) -> Iterator[Path]:
    for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
        if not folder.is_dir():
            continue
        if (folder / "command.txt").is_file() or read_job(folder) is not None:
            yield folder
        elif depth > 1:
            yield from _run_folders(folder, depth - 1)


def _run_name(folder: Path, outputs: Path) -> str:
    return folder.relative_to(outputs).as_posix()


def read_run(folder: Path, outputs: Path) -> Run:
    """Read a run directory."""
    job = read_job(folder)
    lines = last_metrics(folder)
    losses = [loss for line in lines if (loss := line.get("loss")) is not None]
    return Run(
        folder=folder,
        name=_run_name(folder, outputs),
        started=datetime.fromtimestamp(job.started if job else (folder / "command.txt").stat().st_mtime),
        state=_get_state(folder, job),
        step=max((line["step"] for line in lines), default=0),
        loss=losses[-1] if losses else None,
    )


def _get_state(folder: Path, job: Job | None) -> str:
    if job is not None and job.is_alive():
        return "ending" if job.asked_to_stop else "running"
    if is_checkpoint(folder / "final"):
        return "finished"
    if job is None or job.is_on_other_machine:
        return "not finished"
    return "stopped" if job.asked_to_stop else "failed"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a model."""
    return (folder / "config.json").is_file()


def has_heads(checkpoint: str | Path) -> bool | None:
    """Return whether a checkpoint has prediction heads; None where it is no folder of this machine, or unreadable."""
    if not is_checkpoint(Path(checkpoint)):
        return None
    try:
        config = read_object(Path(checkpoint, "config.json"))
    except ValueError:  # opening it says what is wrong
        return None
    return config.get("model_type") == PREDICTION_MODEL_TYPE


def checkpoints(outputs: Path, extra_checkpoints: Sequence[str] = (), *, heads: bool | None = None) -> list[str]:
    """Return checkpoints to choose from: the given ones, then the complete models of runs, the newest first.

    `heads` takes those with prediction heads (True), without (False) or all (None); of a Hub name this is unknown until
    it is loaded, so it is always among them.
    """
    models = [str(run.folder / "final") for run in find_runs(outputs) if is_checkpoint(run.folder / "final")]
    names = dict.fromkeys([*extra_checkpoints, *models])
    return [name for name in names if heads is None or has_heads(name) in (heads, None)]


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of a run's checkpoints: those with a manifest, or with the mark of earlier versions."""
    marks = [mark for name in ("manifest.json", "complete") for mark in folder.glob(f"checkpoint-*/{name}")]
    numbers = {mark.parent.name.removeprefix("checkpoint-") for mark in marks}
    return [int(number) for number in numbers if number.isdigit()]


def read_metrics(folder: Path) -> list[LoggedMetrics]:
    """Return the lines of `metrics.jsonl`, without a line that is still being written."""
    return _parse_metrics(read_run_file(folder, "metrics.jsonl"))


def _changed_settings(folder: Path) -> dict[str, object]:
    """Return the settings of `trainer` that tell how long a run is, where they were changed when it went on."""
    lines = read_run_file(folder, "changes.jsonl").splitlines()
    changes = {key: now for line in lines for key, (_, now) in json.loads(line)["changes"].items()}
    names = ("max_steps", "num_train_epochs")
    return {name: changes[f"trainer.{name}"] for name in names if f"trainer.{name}" in changes}


def last_metrics(folder: Path) -> list[LoggedMetrics]:
    """Return the last complete lines of `metrics.jsonl`: enough for a run's state, however long the file is."""
    return _parse_metrics(_read_tail(folder / "metrics.jsonl"))


def _parse_metrics(text: str) -> list[LoggedMetrics]:
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def loss_rows(lines: Sequence[LoggedMetrics]) -> list[tuple[int, float, str]]:
    """Return (step, loss, name) for a plot of training and evaluation losses; of many points, evenly spread ones."""
    rows = []
    for key, name in LOSS_NAMES.items():
        points = [(line["step"], loss, name) for line in lines if (loss := line.get(key)) is not None]
        stride = -(-len(points) // MAX_PLOT_POINTS) or 1
        rows += points[::-1][::stride][::-1]  # including the last point
    return rows


def log_tail(file: Path) -> str:
    """Return the end of a log as a terminal shows it; empty where there is no log."""
    return "\n".join(render_terminal_text(_read_tail(file)).splitlines()[-TAIL_LINES:])


def _read_tail(file: Path) -> str:
    """Return the last lines of a file; empty where there is no file."""
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    return text if size <= TAIL_BYTES else text.partition("\n")[2]  # the first line is incomplete


def render_terminal_text(text: str) -> str:
    """Return text without colours and control characters; of a line that was overwritten, the last version."""
    text = re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])", "", text)
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        versions = [version for version in line.split("\r") if version.strip()]
        lines.append(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", versions[-1]) if versions else "")
    return "\n".join(lines)


def last_samples(folder: Path) -> tuple[str, list[SampleAnswer]]:
    """Return the newest step in `samples.md`, and its samples."""
    text = read_run_file(folder, "samples.md")
    if not text:
        return "", []
    title, _, body = text.rpartition("## Step ")[2].partition("\n")
    samples: list[SampleAnswer] = []
    image = None
    for line in body.splitlines():
        if match := re.fullmatch(r"!\[sample \d+\]\((samples/[\d-]+\.png)\)", line):
            image = str(folder / match[1])
        elif match := re.match(r"- \*\*(question|reference|answer)\*\*: (.*)", line):
            if match[1] == "question":
                samples.append({"question": match[2]} if image is None else {"image": image, "question": match[2]})
                image = None
            else:
                samples[-1][match[1]] = match[2]
    return f"Step {title.strip()}", samples


def read_run_file(folder: Path, name: str) -> str:
    """Return the text of a file of a run directory; empty where the file does not exist."""
    file = folder / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""
