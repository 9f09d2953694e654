"""Processes of a run: who started whom, and running several to their end without leaving any behind."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # sys/prctl.h

SAVED_EXIT_CODE = 75
"""The exit code of a run that a signal ended and that the same command resumes (EX_TEMPFAIL of sysexits.h)."""

GUARD_EXIT_CODE = 76
"""The exit code of a run that a guard stopped: going on with the same command would most likely end the same way."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals of which a second one ends a run at once."""

SAME_REQUEST_SECONDS = 2.0
"""Signals within so many seconds of the first are the same request: launchers pass on what a terminal sends to all."""

FORWARDED = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a launcher hands on to what it started."""

GRACE_SECONDS = 30.0
"""Seconds that the other processes have to end by themselves after one has ended with an error."""

POLL_SECONDS = 0.05

LAUNCHERS = {"deepspeed", "ds", "torchrun", "accelerate"}
"""Programs that start ranks."""

LAUNCHER_MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "vlm.demo",
}
"""Modules that do so under `python -m`."""


# --- who started whom -----------------------------------------------------------------------------------------------


def parent_of(pid: int) -> int:
    """Return the process that a process belongs to; 0 where it has gone, or where there is no `/proc`."""
    if pid == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def find_launchers() -> list[tuple[int, int]]:
    """Return this process with its launcher, that one with the launcher above it, and so on: (process, parent)."""
    pairs, child = [], os.getpid()
    while is_launcher(command_of(parent := parent_of(child))):
        pairs.append((child, parent))
        child = parent
    return pairs


def command_of(pid: int) -> list[str]:
    """Return the command line of a process; empty where it has gone, or where there is no `/proc`."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def is_launcher(command: Sequence[str]) -> bool:
    """Return whether a command line is that of a launcher of ranks."""
    words = [word for word in command[:5] if word not in ("-u", "-m")]
    names = [os.path.basename(word) for word in words[:2]]
    if not LAUNCHERS.isdisjoint(names) or not LAUNCHER_MODULES.isdisjoint(words[:2]):
        return True
    return any([os.path.basename(word), following] == ["vlm", "launch"] for word, following in pairwise(words))


def descendants(pid: int | None = None) -> list[int]:
    """Return all processes below one (this one); empty where there is no `/proc`."""
    found: list[int] = []
    for file in Path(f"/proc/{pid or os.getpid()}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, file.read_text().split()):
                found += [child, *descendants(child)]
    return found


# --- running several ------------------------------------------------------------------------------------------------


class ProcessGroup:
    """Processes that run together: signals are handed on, and none of them outlives the others.

    On Linux nothing that they start survives either, not even when this process is killed: they get SIGTERM then.

    Args:
        grace: seconds that the others have to end after one has failed, and all after a third SIGINT or SIGTERM: at the
            second one they end by themselves, unless they are writing.
    """

    def __init__(self, grace: float = GRACE_SECONDS):
        self.grace = grace
        self.processes: list[subprocess.Popen[bytes]] = []
        self.code = 0
        self._received: list[int] = []
        self._stops: list[float] = []
        self._deadline: float | None = None
        self._earlier = {*descendants()}

    def run(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
        """Run a command once for each environment until all have ended.

        Returns:
            0 where all ended with 0; `GUARD_EXIT_CODE` where one did with it, since guards kill processes that are
            frozen; else the exit code of the first that did not end with 0: 128 + N where signal N killed it, and
            `SAVED_EXIT_CODE` where that was one of those that came to this process, before it listened to signals.
        """
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a killed process leaves, such as compilers, becomes this one's child
        with self._forwarded_signals():
            for environment in environments:
                process = subprocess.Popen(list(command), env=dict(environment), preexec_fn=_end_with_parent)
                self.processes.append(process)
            for number in [*self._received]:  # while they were being started
                self._signal_all(number)
            while None in [process.poll() for process in self.processes]:
                self._end_after_failure()
                time.sleep(POLL_SECONDS)
            self._end_after_failure()
            self._kill_left()
        is_guarded = any(process.returncode == GUARD_EXIT_CODE for process in self.processes)
        return GUARD_EXIT_CODE if is_guarded else self.code

    def _end_after_failure(self) -> None:
        """Once one has failed, end the others: they may wait for it for ever."""
        failed = [process.returncode for process in self.processes if process.returncode]
        if failed and not self.code:
            first = min(failed)  # one that a signal killed is the cause of the errors of the others
            self.code = SAVED_EXIT_CODE if -first in self._received else 128 - first if first < 0 else first
            self._deadline = time.monotonic() + self.grace
            if self.code != SAVED_EXIT_CODE:  # after a checkpoint the others end by themselves
                self._signal_all(signal.SIGTERM)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._signal_all(signal.SIGKILL)

    def _kill_left(self) -> None:
        while left := set(descendants()) - self._earlier:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _forwarded_signals(self) -> Iterator[None]:
        ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]  # HUP, by nohup
        previous = {number: signal.signal(number, self._forward) for number in FORWARDED if number not in ignored}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in STOP_SIGNALS and (not self._stops or now - self._stops[-1] > SAME_REQUEST_SECONDS):
            self._stops.append(now)
        if len(self._stops) > 2:
            self._deadline = self._deadline or now + self.grace
        self._received.append(number)
        self._signal_all(number)

    def _signal_all(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)  # which does nothing where it has ended


def _end_with_parent() -> None:
    """Between fork and exec: ask Linux for SIGTERM when the launcher has gone."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
