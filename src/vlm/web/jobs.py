"""Runs that the page started: processes of their own, which outlive the page and are found again by it.

What is needed for that lies in the run directory: `page.json` says which process it is, `page.log` is what it prints.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

JOB_FILE, LOG_FILE = "page.json", "page.log"
START_TIME_TOLERANCE = 2.0
"""Seconds by which the time at which a process began may seem to differ: it is told from a clock that is corrected."""

PATIENCE = 60.0
"""Seconds that a run has to end by itself before the page offers to kill it."""


@dataclass(frozen=True)
class Job:
    """A process that runs a training, and leads a group of its own with all that it starts.

    Attributes:
        pid: its number, which is its group's too.
        began: when the system says that it began; a number is given again, a number with this time is not.
        host: the machine's name: run directories may lie on a disk that several machines see.
        started: when the page started it, in seconds since 1970.
        asked_to_stop: when it was asked to end; None: it was not.
        command: its words.
    """

    pid: int
    began: float
    host: str
    started: float
    command: list[str]
    asked_to_stop: float | None = None

    @property
    def is_on_other_machine(self) -> bool:
        """Whether it was started on another machine, of which nothing is known here."""
        return self.host != socket.gethostname()

    def is_alive(self) -> bool:
        """Whether this very process still runs on this machine."""
        if self.is_on_other_machine:
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.began) < START_TIME_TOLERANCE
            return (
                same and process.status() != psutil.STATUS_ZOMBIE
            )  # which has ended, and waits for its parent to look
        except psutil.NoSuchProcess:
            return False


def start(command: Sequence[str], folder: Path) -> Job:
    """Start a run that writes into a folder.

    Args:
        command: its words; no shell reads them.
        folder: the run directory; made where it does not exist.

    Raises:
        ValueError: a run that the page started there still goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = read_job(folder)
    if before is not None and before.is_alive():
        raise ValueError(f"{folder}: a run is going on there (process {before.pid}); stop it first")
    with (folder / LOG_FILE).open("ab") as log:
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    began = psutil.Process(child.pid).create_time()
    job = Job(child.pid, began, socket.gethostname(), time.time(), list(command))
    _write_job(job, folder)
    return job


def read_job(folder: Path) -> Job | None:
    """The run that the page started in a folder; None where it started none."""
    file = folder / JOB_FILE
    return Job(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def stop(folder: Path) -> Job:
    """Ask a run's whole group to end (SIGTERM), and take note of it.

    Raises:
        ValueError: no run that the page started goes on there.
    """
    job = _require_running_job(folder)
    stopped_job = replace(job, asked_to_stop=job.asked_to_stop or time.time())
    _write_job(stopped_job, folder)
    os.killpg(job.pid, signal.SIGTERM)
    return stopped_job


def kill(folder: Path) -> None:
    """End a run's whole group at once (SIGKILL): nothing is saved. For a run that was asked to end and did not.

    Raises:
        ValueError: it was not asked, or no run that the page started goes on there.
    """
    job = _require_running_job(folder)
    if job.asked_to_stop is None:
        raise ValueError(f"{folder}: ask the run to stop first; killing it saves nothing")
    os.killpg(job.pid, signal.SIGKILL)


def can_kill(job: Job | None) -> bool:
    """Whether a run was asked to end so long ago that killing it is offered."""
    return job is not None and job.asked_to_stop is not None and time.time() - job.asked_to_stop > PATIENCE


def _require_running_job(folder: Path) -> Job:
    job = read_job(folder)
    if job is None:
        raise ValueError(f"{folder}: this page did not start that run; stop it where it was started")
    if job.is_on_other_machine:
        raise ValueError(f"{folder}: that run was started on {job.host}; stop it there")
    if not job.is_alive():
        raise ValueError(f"{folder}: the run has ended already")
    return job


def _write_job(job: Job, folder: Path) -> None:
    """Write it whole or not at all: it is read while it is written."""
    new = folder / f"{JOB_FILE}.new"
    new.write_text(json.dumps(asdict(job), indent=2) + "\n", encoding="utf-8")
    new.replace(folder / JOB_FILE)
