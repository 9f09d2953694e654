"""Ends a run that is stuck, on all ranks, with the stacks of all threads.

Each rank counts its progress (`Watchdog.mark`). A thread writes the count into the run directory, and reads the counts
of the other ranks there. If no count changes for `trainer.stuck_after` seconds, every rank writes its stacks and ends.
A stopped rank (SIGSTOP) cannot do this; the other ranks of its machine kill it.
"""

import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.clusters.processes import GUARD_EXIT_CODE
from vlm.train.distributed import barrier

log = logging.getLogger(__name__)

LONGEST_INTERVAL = 10.0
"""The maximum number of seconds between two checks."""
STDERR = 2
"""The file descriptor of stderr; `sys.stderr` may not be a file."""
LOOKS = 10
"""Number of checks within `trainer.stuck_after`."""


class Watchdog:
    """Watches over one rank.

    The rank marks progress: a batch that is fetched, prepared or trained on, a log, an answer. While a checkpoint is
    written, growth of the run directory also counts as progress; while data workers read the first records, their
    processor time does.

    Args:
        folder: the run directory, which all ranks see.
        stuck_after: seconds without progress on any rank.
        rank: this rank.
        world_size: number of ranks.

    Attributes:
        on_end: called with the reason before the process is ended.
    """

    def __init__(self, folder: Path, stuck_after: float, rank: int, world_size: int):
        self.folder, self.stuck_after = folder, stuck_after
        self.rank, self.world_size = rank, world_size
        self.on_end: Callable[[str], object] = lambda reason: None
        self.interval = min(LONGEST_INTERVAL, stuck_after / LOOKS)
        self.heartbeats, self.stacks = folder / "heartbeats", folder / "stuck"
        self._count = 0
        self._seen: dict[int, str] = {}
        self._earlier_stacks: set[Path] = set()
        self._progress_at = time.monotonic()
        self._ended, self._arming = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self.heartbeats.mkdir(parents=True, exist_ok=True)
        self._write_heartbeat()
        if self.rank == 0:
            shutil.rmtree(self.stacks, ignore_errors=True)
        self._stack_file(self.rank).unlink(missing_ok=True)
        barrier()
        # What an earlier run left: a disk of another node has it, and file systems of a network list it for a while.
        self._earlier_stacks = set(self.stacks.glob("rank-*.txt"))
        self._thread.start()

    def mark(self) -> None:
        """Count a unit of finished work."""
        self._count += 1

    def stop(self) -> None:
        """Stop watching."""
        with self._arming:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive():
            self._thread.join(self.interval)  # it may be writing a heartbeat
        self._file(self.rank).unlink(missing_ok=True)
        with suppress(OSError):  # other ranks' files may be in it
            self.heartbeats.rmdir()

    # --- in the thread --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            with self._arming:
                if self._ended.is_set():
                    return
                # Its own thread needs no Python: it ends a process in which no Python code runs any more.
                faulthandler.dump_traceback_later(2 * self.stuck_after, exit=True, file=STDERR)
            try:
                if not self._earlier_stacks.issuperset(self.stacks.glob("rank-*.txt")):
                    self._end("another rank is stuck")
                self._write_heartbeat()
                if self._has_progress():
                    self._progress_at = time.monotonic()
                elif time.monotonic() - self._progress_at > self.stuck_after:
                    self._end(f"no rank has made progress for trainer.stuck_after={self.stuck_after:g} seconds")
            except OSError as error:  # a disk that is full or away for a while
                log.warning("The watchdog could not read or write %s: %s", self.heartbeats, error)

    def _write_heartbeat(self) -> None:
        work = self._measure_work()
        content = {"count": self._count, "work": work, "host": socket.gethostname(), "pid": os.getpid()}
        partial = self._file(self.rank).with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self._file(self.rank))

    def _measure_work(self) -> tuple[int, int]:
        """Return the size of the run directory, on rank 0, and the processor time of child processes."""
        seconds = 0.0
        for child in _children():
            with suppress(psutil.Error):
                times = child.cpu_times()
                seconds += times.user + times.system
        return _folder_size(self.folder) if self.rank == 0 else 0, int(seconds)

    def _has_progress(self) -> bool:
        """Return whether the count of any rank has changed since the last check."""
        changed = False
        for rank in range(self.world_size):
            file = self._file(rank)
            content = file.read_text(encoding="utf-8") if file.exists() else ""
            changed |= content != self._seen.get(rank)
            self._seen[rank] = content
        return changed

    def _end(self, reason: str) -> None:
        """Write the stacks of this rank, wait for those of the other ranks, and end this process."""
        self.stacks.mkdir(exist_ok=True)
        with self._stack_file(self.rank).open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(STDERR, all_threads=True)
        self.on_end(reason)
        log.error("Rank %d is stuck and ends: %s. The stacks of all ranks are in %s.", self.rank, reason, self.stacks)
        ranks = range(self.world_size)
        deadline = time.monotonic() + 2 * self.interval + 1
        while time.monotonic() < deadline and not all(self._stack_file(rank).exists() for rank in ranks):
            time.sleep(self.interval / 10)
        for rank in ranks:
            if not self._stack_file(rank).exists():
                self._kill_frozen(rank)
        for child in _children():
            with suppress(psutil.Error):
                child.kill()
        logging.shutdown()
        os._exit(GUARD_EXIT_CODE)

    def _kill_frozen(self, rank: int) -> None:
        """Kill a rank of this machine whose watchdog does not answer, for example because its process is stopped."""
        try:
            beat = json.loads(self._file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if beat["host"] == socket.gethostname() and beat["pid"] != os.getpid() and psutil.pid_exists(beat["pid"]):
            log.error("Rank %d (process %d) does not answer and is killed", rank, beat["pid"])
            os.kill(beat["pid"], signal.SIGKILL)

    def _file(self, rank: int) -> Path:
        return self.heartbeats / f"rank-{rank}.json"

    def _stack_file(self, rank: int) -> Path:
        return self.stacks / f"rank-{rank}.txt"


def _children() -> list[psutil.Process]:
    """Return the descendants of this process; unlike `multiprocessing`, without reaping any."""
    return psutil.Process().children(recursive=True)


def _folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder, ignoring files that disappear meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        if os.path.basename(path) == "heartbeats":
            continue
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except OSError:
                continue
    return total


class WatchdogCallback(TrainerCallback):
    """Marks the progress of training, from its first step to its end."""

    def __init__(self, watchdog: Watchdog):
        self.watchdog = watchdog

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Start watching."""
        self.watchdog.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Count a step, a part of one, a log, an evaluation or a checkpoint."""
        self.watchdog.mark()

    on_substep_end = on_log = on_evaluate = on_save = on_prediction_step = on_step_end
