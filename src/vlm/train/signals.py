"""Signals to a training process: what each asks for, and a thread that hears them even while the main thread waits.

| signal | first | again |
|---|---|---|
| TERM, INT | save a checkpoint after the current step, then end | end at once, unless a checkpoint is being written |
| USR1, USR2, HUP | the same | nothing more |

When the process that launched a run has gone, its ranks act as on HUP. Imports the standard library only: a run listens
before torch is imported. `stop_on_signal.py` is what a trainer does on a signal.
"""

import atexit
import ctypes
import logging
import multiprocessing
import multiprocessing.util  # registers its own exit function first, which then runs after ours
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from signal import Signals
from types import FrameType
from typing import Any

from vlm.clusters.processes import (
    FORWARDED,
    SAME_REQUEST_SECONDS,
    SAVED_EXIT_CODE,
    STOP_SIGNALS,
    descendants,
    find_launchers,
    parent_of,
)

log = logging.getLogger(__name__)

SIGNALS = FORWARDED
"""Signals that end a run after a checkpoint."""

Handler = Callable[[int, FrameType | None], object] | int | None
"""What `signal.signal` takes and returns."""

LAUNCHER_POLL_MS = 1000
FLUSH_SECONDS = 1.0


class Phase(Enum):
    """Where a run is, which decides what a signal does; the value says when a run ends that was asked to."""

    START = "at once: there is nothing to save yet"
    TRAINING = "after this step, with a checkpoint"
    END = "once the finished model is written, since all steps are done"


class SignalListener:
    """Hears signals while it is entered, in the main thread.

    Attributes:
        phase: where the run is.
        received: the first signal; None: there was none.
    """

    def __init__(self, phase: Phase = Phase.START, *, owns_process: bool = True):
        self.phase, self.owns_process = phase, owns_process
        self.received: Signals | None = None
        self._asked_to_stop: float | None = None
        self._is_saving = False
        self._lock = threading.RLock()  # the phase does not change while the listener decides what to do
        self._launchers = find_launchers()
        self._previous: dict[Signals, Handler] = {}

    def __enter__(self) -> "SignalListener":
        """Install the handlers and start the thread."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                self._previous[number] = signal.signal(number, self._note)
        # The C handler writes each signal's number there, also while the main thread waits for another rank.
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the handlers and end the thread."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within, no signal ends the process: what is being written is finished first."""
        with self._lock:
            self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False

    def enter_phase(self, phase: Phase) -> None:
        """Say where the run is from now on."""
        with self._lock:
            self.phase = phase

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Do nothing in the main thread: the listener acts."""

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        while True:
            numbers = os.read(self._reader, 256) if poll.poll(LAUNCHER_POLL_MS) else b""
            if 0 in numbers:
                return
            for number in numbers:
                if number in self._previous:
                    self._receive(Signals(number), f"Received {Signals(number).name}")
            if any(parent_of(child) != launcher for child, launcher in self._launchers):
                self._launchers = []
                self._receive(signal.SIGHUP, "The process that launched this run has ended")

    def _receive(self, number: Signals, event: str) -> None:
        with self._lock:
            is_first, is_stop, now = self.received is None, number in STOP_SIGNALS, time.monotonic()
            if is_stop and self._asked_to_stop is None:
                self._asked_to_stop = now
            is_second = is_stop and now - (self._asked_to_stop or now) > SAME_REQUEST_SECONDS
            self.received = self.received or number
            if self.phase is Phase.START:
                if os.environ.get("RANK", "0") == "0":  # logging may not be set up yet
                    said = f"vlm: {event}: the run ends {self.phase.value}. The same command starts it again."
                    print(said, file=sys.stderr)
                self._end_process(SAVED_EXIT_CODE)
            elif is_second and self._is_saving:
                log.warning("%s again: the run ends as soon as the current write is complete.", event)
            elif is_second:
                log.warning("%s again: the run ends at once, without saving.", event)
                self._end_process(128 + number)
            elif is_first:
                end = "as soon as the checkpoint is written" if self._is_saving else self.phase.value
                log.info("%s: the run ends %s. SIGINT or SIGTERM again ends it at once.", event, end)

    def _end_process(self, code: int) -> None:
        """End the process from the listener's thread, whatever the main thread waits for."""
        if self.owns_process:
            end_process(code)
        main = ctypes.c_ulong(threading.main_thread().ident or 0)  # of a notebook, which goes on
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


def current_listener() -> SignalListener | None:
    """Return the listener that this process has entered."""
    listener = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return listener if isinstance(listener, SignalListener) else None


def end_process(code: int) -> None:
    """End this process and all that it started, without the interpreter's own end; what was printed is written."""
    for pid in descendants():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    flush = threading.Thread(target=lambda: [stream.flush() for stream in (sys.stdout, sys.stderr)], daemon=True)
    flush.start()
    flush.join(FLUSH_SECONDS)  # the main thread may hold a stream whose reader is slow
    os._exit(code)


_held = threading.local()


def _hold_signals() -> None:
    """Hold signals back while this thread forks: one to the child waits until the child is deaf to its parent's."""
    if current_listener() is not None:
        _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release_signals() -> None:
    mask = vars(_held).pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _forget_in_fork() -> None:
    """Make a forked process deaf to its parent's signals; SIGTERM ends it, as `multiprocessing` expects."""
    if current_listener() is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    _release_signals()


os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_forget_in_fork)


@atexit.register
def _kill_workers() -> None:
    """Kill data workers that are left after an error: Python would send them SIGTERM, which they ignore, and wait."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def ignore_signals_in_workers(loader: Any) -> Any:
    """Return a `DataLoader` whose workers ignore signals to all processes of a run: they end with their parent."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper starts the workers of this one
    inner.worker_init_fn = partial(ignore_signals, inner.worker_init_fn)
    return loader


def ignore_signals(init_fn: Callable[[int], None] | None, worker: int) -> None:
    """Start a data worker that ignores signals: PyTorch would let it die, and its process with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init_fn is not None:
        init_fn(worker)
