"""Evaluations, exports and merges that the page starts: jobs as runs are, in a folder where no list of runs looks.

Needs neither torch nor Gradio.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from vlm.web import jobs
from vlm.web.runs import find_runs, log_tail

TASKS_FOLDER = ".page"
"""The folder of tasks, below the folder of outputs."""
TASK_FILE = "task.json"
EVALUATION, EXPORT = "evaluation", "export"
"""Kinds of tasks."""
RESULT_MARKS = {EVALUATION: "results.json", EXPORT: "*"}
"""Kind -> the file that the task's result has once it is complete."""


@dataclass(frozen=True)
class Task:
    """What a task does: `title` says it in words, `result` is the folder that it writes."""

    kind: str
    title: str
    result: str


@dataclass(frozen=True)
class StartedTask:
    """A task and its job.

    Attributes:
        task: what it does.
        folder: where its log is.
        job: its process.
        state: `running`, `ending` (asked to stop), `finished`, `stopped` or `failed`.
    """

    task: Task
    folder: Path
    job: jobs.Job
    state: str

    @property
    def is_active(self) -> bool:
        """Whether the task's process is alive."""
        return self.state in ("running", "ending")

    @property
    def log(self) -> str:
        """The end of what the task printed."""
        return log_tail(self.folder / jobs.LOG_FILE)

    @property
    def progress(self) -> float | None:
        """The completed share of the step that the log's last line counts, from 0 to 1; None if it counts none."""
        if self.state == "finished":
            return 1.0
        found = re.findall(r"(\d{1,3})%\|", self.log.rpartition("\n")[2])
        return min(int(found[-1]) / 100, 1.0) if found else None

    @property
    def seconds(self) -> float | None:
        """How long the task has been running; None once it has ended."""
        return datetime.now().timestamp() - self.job.started if self.is_active else None


def check_idle(outputs: Path) -> None:
    """Raise ValueError if a run or a task that the page started is active: two would share one machine's memory."""
    busy = [run.name for run in find_runs(outputs) if run.is_active]
    busy += [task.task.title for task in find_tasks(outputs) if task.is_active]
    if busy:
        raise ValueError(f"{busy[0]} is still running. Stop it or wait for it to finish, then start this again.")


def start_task(outputs: Path, task: Task, command: Sequence[str]) -> StartedTask:
    """Start a task; ValueError if something else is active."""
    check_idle(outputs)
    folder = outputs / TASKS_FOLDER / f"{task.kind}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    (folder / TASK_FILE).write_text(json.dumps(asdict(task)), encoding="utf-8")
    jobs.start(command, folder)
    started = read_task(folder)
    assert started is not None
    return started


def find_tasks(outputs: Path, kind: str | None = None) -> list[StartedTask]:
    """Return the tasks of a kind, the newest first; of all kinds without one."""
    folders = sorted((outputs / TASKS_FOLDER).glob(f"{kind or '*'}-*"), key=lambda folder: folder.name[-22:])
    return [found for folder in reversed(folders) if (found := read_task(folder)) is not None]


def read_task(folder: Path) -> StartedTask | None:
    """Return the task of a folder; None if there is none."""
    job, file = jobs.read_job(folder), folder / TASK_FILE
    if job is None or not file.is_file():
        return None
    task = Task(**json.loads(file.read_text(encoding="utf-8")))
    return StartedTask(task, folder, job, _read_state(task, job))


def _read_state(task: Task, job: jobs.Job) -> str:
    if job.is_alive():
        return "ending" if job.asked_to_stop else "running"
    if any(Path(task.result).glob(RESULT_MARKS[task.kind])):
        return "finished"
    return "stopped" if job.asked_to_stop else "failed"
