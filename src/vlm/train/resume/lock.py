"""The lock on a run directory: only one run trains in it at a time, and holds the lock as long as it lives.

The file system's lock on `run.lock` ends with the process that holds it, however that ends. Other machines may share
the disk without sharing such locks. So the holder, which is named in `run.lock.json`, touches that file every few
seconds. A run that starts on another machine waits for such a sign of life before it takes over a directory.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import weakref
from dataclasses import asdict
from pathlib import Path

from vlm.runs.holder import HOLDER_FILE, PATIENCE, Holder, has_ended, read_holder, touched

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 10.0
"""Seconds between two signs of life of a run."""

ORPHAN_SECONDS = 10.0
"""Seconds within which a process that a dead run has just forked must release the run's lock."""

HELD = (errno.EAGAIN, errno.EACCES)
"""Errors of a lock that another process holds."""

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Errors of a file system without locks, on which only signs of life can be used."""


class RunLock:
    """The lock of a run directory, which is created if it is missing; a context manager.

    Raises:
        ValueError: another run holds it, or the directory cannot be written to.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None
        self._released = threading.Event()
        close = weakref.WeakMethod(self._close)
        # Otherwise a data worker would hold the lock of a killed run for as long as the worker lives.
        os.register_at_fork(after_in_child=lambda: method() if (method := close()) is not None else None)

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock and hold it until `release` or the end of this process."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_exclusive = self._lock_file()
            holder = read_holder(self.folder)
            if holder is not None and not (is_exclusive and holder.host == socket.gethostname()):
                self._wait_for_silence(holder)
            self._write_holder(Holder(socket.gethostname(), os.getpid(), time.time()))
        except OSError as error:
            self._close()
            raise ValueError(
                f"trainer.output_dir={self.folder}: cannot be written to ({error.strerror or error}); choose another"
            ) from error
        if holder is not None:
            log.info("%s: taken over from %s, which ended without releasing it", self.folder, holder)
        threading.Thread(target=self._touch, name="run-lock", daemon=True).start()

    def _lock_file(self) -> bool:
        """Lock `run.lock`; return whether this excludes other processes here, as some file systems have no locks."""
        end = time.monotonic() + ORPHAN_SECONDS
        while True:
            self._descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return False
                self._close()
                if error.errno not in HELD:
                    raise
                if time.monotonic() > end or not has_ended(read_holder(self.folder)):
                    raise ValueError(self._refusal()) from None
                time.sleep(ORPHAN_SECONDS / 100)
                continue
            if os.fstat(self._descriptor).st_nlink:  # else the run before removed it in between
                return True
            self._close()

    def _write_holder(self, holder: Holder) -> None:
        partial = self.folder / f"{HOLDER_FILE}.partial"
        partial.write_text(f"{json.dumps(asdict(holder))}\n", encoding="utf-8")
        partial.replace(self.folder / HOLDER_FILE)

    def _refusal(self) -> str:
        holder = read_holder(self.folder) or "another process"
        return (
            f"trainer.output_dir={self.folder}: another run is training in it ({holder}). Wait until it ends, stop "
            "it, or choose another directory; several ranks of one run need a launcher (torchrun, deepspeed)"
        )

    def _wait_for_silence(self, holder: Holder) -> None:
        """Return once a holder that may be alive has shown no sign of life for `PATIENCE` seconds.

        Raises:
            ValueError: it has shown one.
        """
        file = self.folder / HOLDER_FILE
        last, now = touched(file), self._now()
        if last is None or now - last > PATIENCE:
            return
        log.info("%s: waiting up to %.0f s for a sign of life from %s", self.folder, PATIENCE, holder)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(HEARTBEAT_SECONDS / 10)
            now_touched = touched(file)
            if now_touched is None:
                return
            if now_touched != last:
                self._close()
                raise ValueError(self._refusal())

    def _now(self) -> float:
        """Return the time of the file system's clock, which may be on another machine."""
        probe = self.folder / f"{HOLDER_FILE}.probe"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _touch(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.folder / HOLDER_FILE)
            except FileNotFoundError:
                return  # released, or removed by hand
            except OSError as error:  # the lock itself is held all the same
                log.warning("%s: could not write a sign of life: %s", self.folder, error)

    def move(self, target: Path) -> None:
        """Rename the run directory, and release its lock; a new directory of the old name needs a new lock."""
        self._released.set()
        self.folder.rename(target)
        self.folder = target
        self.release()

    def release(self) -> None:
        """Release the lock, and remove its files."""
        self._released.set()
        for name in (HOLDER_FILE, LOCK_FILE):
            (self.folder / name).unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)
