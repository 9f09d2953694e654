"""The lock on a run directory: one run trains in it at a time, and it is held for as long as that run lives.

The file system's lock on `run.lock` ends with the process that holds it, however that ends. Other machines may share
the disk without sharing such locks, so the holder, whom `run.lock.json` names, touches that file every few seconds: a
start on another machine waits for a sign of life before it takes a directory over.
"""

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

LOCK_FILE, HOLDER_FILE = "run.lock", "run.lock.json"
HEARTBEAT_SECONDS = 10.0
"""Seconds between two signs of life of a run."""

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


class RunLock:
    """The lock of a run directory, which is made where it is missing; a context manager.

    Raises:
        ValueError: another run has it, or nothing can be written there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = FileLock(folder / LOCK_FILE, thread_local=False)
        self._released = threading.Event()

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def acquire(self) -> None:
        """Take the lock; it stays with this process until `release` or the process's end."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise ValueError(
                f"trainer.output_dir={self.folder}: cannot be written to ({error.strerror or error}); choose another"
            ) from error
        threading.Thread(target=self._touch, name="run-lock", daemon=True).start()

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(self._refusal()) from None
        holder = read_holder(self.folder)
        if holder is not None and holder.host != socket.gethostname() and self._shows_life(holder):
            self._lock.release()
            raise ValueError(self._refusal())
        if holder is not None:
            log.info("%s: the run of %s ended without releasing it", self.folder, holder)
        text = json.dumps(asdict(Holder(socket.gethostname(), os.getpid(), time.time())))
        partial = self.folder / f"{HOLDER_FILE}.partial"
        partial.write_text(f"{text}\n", encoding="utf-8")
        partial.replace(self.folder / HOLDER_FILE)

    def _refusal(self) -> str:
        holder = read_holder(self.folder) or "another process"
        return (
            f"trainer.output_dir={self.folder}: another run trains in it ({holder}). Wait for its end, stop it, or "
            "choose another directory; several ranks of one run need a launcher (torchrun, deepspeed)"
        )

    def _shows_life(self, holder: Holder) -> bool:
        """Return whether a holder on another machine touches its file within `PATIENCE` seconds."""
        file = self.folder / HOLDER_FILE
        last = _touched(file)
        probe = self.folder / f"{HOLDER_FILE}.probe"
        probe.touch()  # the clock of the file system, not of this machine
        now = probe.stat().st_mtime
        probe.unlink()
        if last is None or now - last > PATIENCE:
            return False
        log.info("%s: waiting up to %.0f s for a sign of life of %s", self.folder, PATIENCE, holder)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(HEARTBEAT_SECONDS / 10)
            if (touched := _touched(file)) != last:
                return touched is not None
        return False

    def _touch(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.folder / HOLDER_FILE)
            except FileNotFoundError:
                return  # released, or removed by hand
            except OSError as error:  # the lock itself is held all the same
                log.warning("%s: no sign of life could be written: %s", self.folder, error)

    def move(self, target: Path) -> None:
        """Rename the run directory, and release it: the lock of a directory of the old name is another one."""
        self._released.set()
        self.folder.rename(target)
        self.folder = target
        self.release()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back, and remove its files."""
        self._released.set()
        for name in (HOLDER_FILE, LOCK_FILE):
            (self.folder / name).unlink(missing_ok=True)
        self._lock.release()


def _touched(file: Path) -> float | None:
    """Return when a file was last touched; None where it is gone. It is opened: network file systems look then."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime
    except FileNotFoundError:
        return None


def read_holder(folder: Path) -> Holder | None:
    """Return the process that holds, or last held, a run directory; None where none is recorded."""
    file = folder / HOLDER_FILE
    try:
        return Holder(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
