"""How a guard ends a run, and the message for data workers that die."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vlm.checks.fields import RunFailed
from vlm.clusters.processes import GUARD_EXIT_CODE
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.schema import RunConfig

log = logging.getLogger(__name__)

WORKER_DIED = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)")
"""The beginning of PyTorch's message about data workers that died."""

DEATH_SECONDS = 2.0
"""How long it may take until a worker whose connection broke is known to be dead, in seconds."""


class GuardStop(SystemExit):
    """Ends the run on this rank with `GUARD_EXIT_CODE`; every rank raises it at the same step."""

    def __init__(self, message: str):
        super().__init__(GUARD_EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class DataWorkerDied(RunFailed):
    """A data worker ended without being asked to."""


@contextmanager
def explain_worker_death(config: RunConfig) -> Iterator[None]:
    """Context in which a data worker that dies ends the run with a message that says what to do.

    Raises:
        DataWorkerDied: a data worker died.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        reason = str(error) if WORKER_DIED.search(str(error)) else _wait_for_death(error)
        if reason is None or isinstance(error, RunFailed):
            raise
        raise DataWorkerDied(describe_worker_death(reason, config)) from error


def _wait_for_death(error: BaseException) -> str | None:
    """Return what PyTorch says of a worker whose connection broke before it was known to be dead; None: of none."""
    if not isinstance(error, (ConnectionError, EOFError)):
        return None
    try:
        time.sleep(DEATH_SECONDS)  # PyTorch's handler of the signal raises within it
    except RuntimeError as death:
        return str(death) if WORKER_DIED.search(str(death)) else None
    return None


def describe_worker_death(reason: str, config: RunConfig) -> str:
    """Return which data workers died, the likely cause, and the keys that help; `reason` is PyTorch's message."""
    death = WORKER_DIED.search(reason)
    pids = death[1].strip() if death is not None else "?"
    trainer = config.trainer
    workers = f"trainer.dataloader_num_workers (now {trainer.dataloader_num_workers})"
    if "Bus error" in reason or "shared memory" in reason:
        cause = "shared memory (/dev/shm) is full"
        advice = f"Make it larger (docker run --shm-size=16g), or lower {workers}."
    elif "signal: Killed" in reason or "exited unexpectedly" in reason:
        cause = "the system has probably killed it because memory ran out (see dmesg)"
        advice = f"Lower {workers}{_smaller_buffers(config.dataset, trainer.dataloader_prefetch_factor)}."
    else:
        cause = reason.split("\n")[0].rstrip(".")
        advice = "With trainer.dataloader_num_workers=0, the run reads records in its own process and shows the error."
    again = "The same command resumes from the newest checkpoint."
    return f"A data worker died (process {pids}): {cause}. {advice} {again}"


def _smaller_buffers(data: DatasetConfig, prefetch: int | None) -> str:
    """Return the other keys that lower the memory of data workers."""
    keys = f", or trainer.dataloader_prefetch_factor (now {prefetch or 2} batches per worker)"
    buffer = f", or dataset.shuffle_buffer (now {data.shuffle_buffer:,} records per worker)"
    return f"{keys}{buffer}" if data.streaming else keys
