"""Runs as their directories tell of them: which there are, how far each came, what it logged.

Needs neither torch nor Gradio. Everything is read from disk each time, so a restarted page knows as much as before.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlm.web.jobs import Job, read_job

PREDICTION_MODEL_TYPES = ("vlm_prediction",)
"""`model_type` of checkpoints with prediction heads."""

MAX_RUN_DEPTH = 2
"""Runs lie directly below the folder of outputs, or in a folder there."""

TAIL_BYTES, TAIL_LINES = 64 * 1024, 200
"""So much of a log's end is read, and so many lines of it are shown."""

MAX_PLOT_POINTS = 1000
"""Of each loss in a plot."""


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        folder: where it is.
        name: its path below the folder of outputs.
        started: when it began, as far as its files tell.
        state: `running`, `ending` (asked to stop), `finished`, `stopped`, `failed`, or `not finished` where it was
            started elsewhere and may or may not go on.
        step: the last step logged; 0 before there is one.
        loss: the last training loss logged.
    """

    folder: Path
    name: str
    started: datetime
    state: str
    step: int
    loss: float | None

    @property
    def progress(self) -> float | None:
        """The share that is done, where it can be told."""
        return 1.0 if self.state == "finished" else _get_progress(self.folder, last_metrics(self.folder))

    @property
    def is_active(self) -> bool:
        """Whether its process lives."""
        return self.state in ("running", "ending")


def find_runs(outputs: Path) -> list[Run]:
    """The runs below a folder, the newest first."""
    runs = [read_run(folder, outputs) for folder in _run_folders(outputs, MAX_RUN_DEPTH)]
    return sorted(runs, key=lambda run: run.started, reverse=True)


def find_run(outputs: Path, name: str | None) -> Run | None:
    """The run of a name that `find_runs` gave; None where there is none, so that no other folder is ever read."""
    folder = next((one for one in _run_folders(outputs, MAX_RUN_DEPTH) if _run_name(one, outputs) == name), None)
    return None if folder is None else read_run(folder, outputs)


def _run_folders(folder: Path, depth: int) -> list[Path]:
    if not folder.is_dir():
        return []
    found = []
    for one in sorted(folder.iterdir()):
        if not one.is_dir():
            continue
        if (one / "command.txt").is_file() or read_job(one) is not None:
            found.append(one)
        elif depth > 1:
            found += _run_folders(one, depth - 1)
    return found


def _run_name(folder: Path, outputs: Path) -> str:
    return folder.relative_to(outputs).as_posix()


def read_run(folder: Path, outputs: Path) -> Run:
    """What a run directory says of its run."""
    job = read_job(folder)
    lines = last_metrics(folder)
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    return Run(
        folder=folder,
        name=_run_name(folder, outputs),
        started=_get_start_time(folder, job),
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


def _get_start_time(folder: Path, job: Job | None) -> datetime:
    """When the page started it; else when its command was written, which is the first thing that a run does."""
    file = folder / "command.txt"
    return datetime.fromtimestamp(job.started if job is not None else file.stat().st_mtime)


def _get_progress(folder: Path, lines: Sequence[dict[str, Any]]) -> float | None:
    """The share of a run that is done: of `max_steps` where that is set, else of its epochs."""
    file = folder / "config.yaml"
    if not lines or not file.is_file():
        return None
    trainer = OmegaConf.load(file).trainer
    if trainer.max_steps is not None and trainer.max_steps > 0:
        share = lines[-1]["step"] / trainer.max_steps
    elif trainer.num_train_epochs and "epoch" in lines[-1]:
        share = lines[-1]["epoch"] / trainer.num_train_epochs
    else:
        return None
    return min(share, 1.0)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model that can be asked."""
    return (folder / "config.json").is_file()


def has_heads(checkpoint: str | Path) -> bool | None:
    """Whether a checkpoint has prediction heads; None where it is no folder of this machine."""
    file = Path(checkpoint, "config.json")
    return (
        json.loads(file.read_text(encoding="utf-8")).get("model_type") in PREDICTION_MODEL_TYPES
        if file.is_file()
        else None
    )


def checkpoints(outputs: Path, extra_checkpoints: Sequence[str] = (), *, heads: bool | None = None) -> list[str]:
    """Checkpoints to choose from: those given, and the complete models of runs, the newest first.

    Args:
        outputs: the folder of runs.
        extra_checkpoints: paths and Hub names; of the latter it is only known what they are once they are loaded.
        heads: those with prediction heads, those without, or None: all.
    """
    own = [str(run.folder / "final") for run in find_runs(outputs) if is_checkpoint(run.folder / "final")]
    return [
        one for one in dict.fromkeys([*extra_checkpoints, *own]) if heads is None or has_heads(one) in (heads, None)
    ]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; one that is being written right now is left out."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    content = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]


def last_metrics(folder: Path) -> list[dict[str, Any]]:
    """The last whole lines of `metrics.jsonl`: enough to know where a run is, however long it is."""
    text = _read_tail(folder / "metrics.jsonl")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def loss_rows(lines: Sequence[dict[str, Any]], max_points: int = MAX_PLOT_POINTS) -> list[tuple[int, float, str]]:
    """(step, loss, which) for a plot: the training loss, and those of evaluations; of many, evenly spread ones."""
    names = {"loss": "training", "eval_loss": "evaluation", "eval_blank_loss": "evaluation, blank images"}
    rows = []
    for key, name in names.items():
        found = [(line["step"], line[key], name) for line in lines if line.get(key) is not None]
        every = -(-len(found) // max_points) or 1
        rows += found[::-1][::every][::-1]  # with the last one
    return rows


def log_tail(file: Path) -> str:
    """The end of a log as a terminal would show it; empty where there is none."""
    return "\n".join(render_terminal_text(_read_tail(file)).splitlines()[-TAIL_LINES:])


def _read_tail(file: Path) -> str:
    """The last lines of a file, which may be long; empty where there is none."""
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    return text if size <= TAIL_BYTES else text.partition("\n")[2]  # the first one is torn


def render_terminal_text(text: str) -> str:
    """Text without colours and control characters; of a line that was written over, what was written last."""
    text = re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])", "", text)
    kept = []
    for line in text.replace("\r\n", "\n").split("\n"):
        parts = [part for part in line.split("\r") if part.strip()]
        kept.append(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", parts[-1]) if parts else "")
    return "\n".join(kept)


def last_samples(folder: Path) -> tuple[str, list[dict[str, str]]]:
    """The newest step of `samples.md`, and its samples: `question`, `reference`, `answer`, and `image` (a path)."""
    file = folder / "samples.md"
    if not file.is_file():
        return "", []
    title, _, body = file.read_text(encoding="utf-8").rpartition("## Step ")[2].partition("\n")
    samples: list[dict[str, str]] = []
    image = None
    for line in body.splitlines():
        if found := re.fullmatch(r"!\[sample \d+\]\((samples/\d+\.png)\)", line):
            image = str(folder / found[1])
        elif found := re.match(r"- \*\*(question|reference|answer)\*\*: (.*)", line):
            if found[1] == "question":
                samples.append({} if image is None else {"picture": image})
                image = None
            samples[-1][found[1]] = found[2]
    return f"Step {title.strip()}", samples


def read_run_file(folder: Path, name: str) -> str:
    """A file of a run directory; empty where it is not there yet."""
    file = folder / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""
