"""Waiting for what another thread or process brings about: as long as it may still come, however slow the machine is.

The one bound by the clock, `HANG`, ends a test that hangs. It is no measure of speed.
"""

import signal
import subprocess
import time
from collections.abc import Callable
from typing import Protocol

HANG = 900.0
"""Seconds after which a wait is taken to hang."""


class Process(Protocol):
    """A process that can be asked whether it has ended, such as `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        ...


def restore_signals() -> None:
    """Undo what a process inherits where tests themselves run in the background, or under nohup."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def wait_until(
    condition: Callable[[], object], *processes: Process, pause: Callable[[], object] = lambda: time.sleep(0.02)
) -> None:
    """Return when `condition` holds; fail when one of `processes`, which should bring it about, has ended before."""
    end = time.monotonic() + HANG
    while not condition():
        ended = [process.poll() for process in processes if process.poll() is not None]
        if ended and not condition():
            raise AssertionError(f"a process ended with status {ended[0]} before the condition held")
        if time.monotonic() > end:
            raise AssertionError(f"the condition did not hold within {HANG:.0f} s")
        pause()


def run(
    words: list[str], *, cwd: object = None, env: dict[str, str] | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its exit status, output and errors, whatever the status is."""
    return subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=cwd, env=env, input=stdin, timeout=HANG
    )
