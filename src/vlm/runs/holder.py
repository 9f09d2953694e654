"""The process that trains in a run directory, as `run.lock.json` names it, and whether it is alive.

`train/resume/lock.py` writes the file and touches it every few seconds. Imports the standard library only.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HOLDER_FILE = "run.lock.json"
PATIENCE = 90.0
"""Seconds without a sign of life after which a run on another machine counts as dead."""


@dataclass(frozen=True)
class Holder:
    """The process that trains in a run directory: rank 0 of the run. `since` is in seconds since 1970."""

    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {datetime.fromtimestamp(self.since):%Y-%m-%d %H:%M:%S}"


def read_holder(folder: Path) -> Holder | None:
    """Return the process that holds, or last held, a run directory; None if none is recorded."""
    file = folder / HOLDER_FILE
    try:
        return Holder(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def has_ended(holder: Holder | None) -> bool:
    """Return whether a holder was a process of this machine that has ended."""
    if holder is None or holder.host != socket.gethostname():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError, TypeError):  # it is another user's, or no process id
        pass
    return False


def touched(file: Path) -> float | None:
    """Return when a file was last touched, or None. It is opened, because network file systems then update its time."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime
    except FileNotFoundError:
        return None


def is_held(folder: Path) -> bool:
    """Return whether a run in a directory is alive: its process on this machine, or a recent sign from another."""
    try:
        holder, last = read_holder(folder), touched(folder / HOLDER_FILE)
    except OSError:
        return False
    if holder is None or last is None or has_ended(holder):
        return False
    return holder.host == socket.gethostname() or time.time() - last < PATIENCE
