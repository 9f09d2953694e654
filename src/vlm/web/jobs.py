"""Training runs that the page started: separate processes that outlive the page, and that it finds again.

Their run directories hold what that needs: `page.json` describes the process, `page.log` is its output.
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

from vlm.config.secrets import mask_words

JOB_FILE, LOG_FILE = "page.json", "page.log"
START_TIME_TOLERANCE = 2.0
"""Seconds by which two readings of a process's start time may differ: it is computed from a clock that is corrected."""

KILL_DELAY_SECONDS = 60.0
"""Seconds that a run has to end by itself before the page offers to kill it."""


@dataclass(frozen=True)
class Job:
    """A process that runs a training, and leads a group of all that it starts. Times are seconds since 1970."""

    pid: int
    """The id of the process and of its group."""
    began: float
    """When the process began, as the system reports it; ids are reused, ids with this time are not."""
    host: str
    """The machine's name: several machines may share the disk of the run directories."""
    started: float
    """When the page started the process."""
    command: list[str]
    """Its words, without secrets."""
    asked_to_stop: float | None = None
    """When the process was asked to end."""

    @property
    def is_on_other_machine(self) -> bool:
        """Whether the job was started on another machine, so that its state is unknown here."""
        return self.host != socket.gethostname()

    def is_alive(self) -> bool:
        """Return whether this very process still runs on this machine."""
        if self.is_on_other_machine:
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.began) < START_TIME_TOLERANCE
            return same and process.status() != psutil.STATUS_ZOMBIE  # a zombie has ended
        except psutil.NoSuchProcess:
            return False


def start(command: Sequence[str], folder: Path) -> None:
    """Start a run that writes into a folder; ValueError if one that the page started there is still running.

    The words of its command reach the process as they are: no shell reads them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_job(folder)
    if earlier is not None and earlier.is_alive():
        raise ValueError(f"{folder}: a run is already active there (process {earlier.pid}); stop it first")
    with (folder / LOG_FILE).open("ab") as log:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    began = psutil.Process(child.pid).create_time()
    _write_job(Job(child.pid, began, socket.gethostname(), time.time(), mask_words(command)), folder)


def read_job(folder: Path) -> Job | None:
    """Return the run that the page started in a folder; None if it started none."""
    file = folder / JOB_FILE
    return Job(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def stop(folder: Path) -> None:
    """Ask all processes of a run to end (SIGTERM), and record that they were asked."""
    job = _require_running_job(folder)
    _write_job(replace(job, asked_to_stop=job.asked_to_stop or time.time()), folder)
    os.killpg(job.pid, signal.SIGTERM)


def kill(folder: Path) -> None:
    """Kill all processes of a run (SIGKILL) that was asked to end and did not; nothing is saved."""
    job = _require_running_job(folder)
    if job.asked_to_stop is None:
        raise ValueError(f"{folder}: ask the run to stop first; killing it saves nothing")
    os.killpg(job.pid, signal.SIGKILL)


def can_kill(job: Job | None) -> bool:
    """Return whether a run was asked to end so long ago that killing it is offered."""
    return job is not None and job.asked_to_stop is not None and time.time() - job.asked_to_stop > KILL_DELAY_SECONDS


def _require_running_job(folder: Path) -> Job:
    """Return the run in a folder; ValueError if it is not running, or not one of this page on this machine."""
    job = read_job(folder)
    if job is None:
        raise ValueError(f"{folder}: this page did not start that run; stop it where it was started")
    if job.is_on_other_machine:
        raise ValueError(f"{folder}: that run was started on {job.host}; stop it there")
    if not job.is_alive():
        raise ValueError(f"{folder}: the run has ended already")
    return job


def _write_job(job: Job, folder: Path) -> None:
    """Replace the file in one step: others may read it meanwhile."""
    new = folder / f"{JOB_FILE}.new"
    new.write_text(json.dumps(asdict(job), indent=2) + "\n", encoding="utf-8")
    new.replace(folder / JOB_FILE)
