"""Runs as their directories describe them: which exist, their progress, and what they logged.

Needs neither torch nor Gradio. Everything is read from disk each time, so that a restarted page loses nothing.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Required, TypedDict, cast

from vlm.checks.checkpoint_files import read_object
from vlm.runs.charts import Curve
from vlm.runs.files import Folder, JsonObject, parse_line
from vlm.runs.read import RunDirectory, is_checkpoint
from vlm.web.jobs import Job, read_job

PREDICTION_MODEL_TYPE = "vlm_prediction"
"""`model_type` of checkpoints with prediction heads."""

MAX_RUN_DEPTH = 2
"""Runs lie directly below the folder of outputs, or in a folder there."""

TAIL_LINES = 200
"""How many lines of a log's end are shown."""

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
        """The completed share of `max_steps` where it is set, else of the epochs; None if it is unknown."""
        return 1.0 if self.state == "finished" else RunDirectory(self.folder).progress

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
        if folder.name.startswith(".") or not folder.is_dir():  # `.page` has the page's own tasks
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


def has_heads(checkpoint: str | Path) -> bool | None:
    """Return whether a checkpoint has prediction heads; None if it is no folder of this machine, or unreadable."""
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
    """Return the steps of a run's whole checkpoints."""
    return RunDirectory(folder).checkpoints


def read_metrics(folder: Path) -> list[LoggedMetrics]:
    """Return the lines of `metrics.jsonl`, without lines that are damaged or still being written."""
    return _logged(Folder(folder).json_lines("metrics.jsonl"))


def last_metrics(folder: Path) -> list[LoggedMetrics]:
    """Return the last complete lines of `metrics.jsonl`: enough for a run's state, however long the file is."""
    *lines, _ = Folder(folder).tail("metrics.jsonl").split("\n")
    return _logged([found for line in lines if (found := parse_line(line)) is not None])


def _logged(lines: Sequence[JsonObject]) -> list[LoggedMetrics]:
    return [cast(LoggedMetrics, line) for line in lines if isinstance(line.get("step"), int)]


def loss_curves(lines: Sequence[LoggedMetrics]) -> list[Curve]:
    """Return the curves of training and evaluation losses, for a figure, which draws of many points the extremes."""
    curves = []
    for key, name in LOSS_NAMES.items():
        points = [(line["step"], loss) for line in lines if (loss := line.get(key)) is not None]
        curves.append(Curve(name, points, marked=key != "loss"))
    return [curve for curve in curves if curve.points]


def log_tail(file: Path) -> str:
    """Return the end of a log as a terminal shows it; empty if there is no log."""
    return "\n".join(render_terminal_text(Folder(file.parent).tail(file.name)).splitlines()[-TAIL_LINES:])


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
    steps = list(RunDirectory(folder).samples.items())
    if not steps:
        return "", []
    step, answers = steps[-1]
    samples: list[SampleAnswer] = []
    for answer in answers:
        texts: SampleAnswer = {"question": answer.question, "reference": answer.reference, "answer": answer.answer}
        samples.append(texts if answer.image is None else {**texts, "image": str(answer.image)})
    return f"Step {step}", samples


def read_run_file(folder: Path, name: str) -> str:
    """Return the text of a file of a run directory; empty if the file does not exist."""
    return Folder(folder).text(name)
