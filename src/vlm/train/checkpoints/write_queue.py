"""Writes files one after the other: at once, or in a thread of its own while the run continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

T = TypeVar("T")


class WriteQueue:
    """The files of one checkpoint that still have to be written.

    Args:
        in_background: whether a thread writes them; their contents are then first copied into host memory.
    """

    def __init__(self, *, in_background: bool):
        self.in_background = in_background
        self._pending: list[Future[None]] = []
        self._thread: ThreadPoolExecutor | None = None

    def hold(self, state: T) -> T:
        """Return a state that does not change while the run continues."""
        if not self.in_background:
            return state
        copied: Any = copy_to_host(state)
        return copied

    def add(self, write: Callable[[], None]) -> None:
        """Call `write`, which raises no errors of writing, now or after those that were added before it."""
        if not self.in_background:
            write()
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending.append(self._thread.submit(write))

    def is_done(self) -> bool:
        """Return whether everything that was added is written."""
        return all(future.done() for future in self._pending)

    def wait(self) -> None:
        """Wait until everything is written, and raise what a `write` raised."""
        for future in self._pending:
            future.result()
        self._pending.clear()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def copy_to_host(state: Any) -> Any:
    """Return a copy of nested dictionaries, lists and tensors, with all tensors on the CPU."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        return stager.stage(state)
    finally:
        stager.close()
