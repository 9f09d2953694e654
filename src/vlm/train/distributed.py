"""What ranks exchange: broadcasts, gathers, barriers and a lock. A run with one rank passes through all of them."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist
from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

T = TypeVar("T")


class Rank0Failed(SystemExit):
    """Ends another rank than the first, which has failed and says why: nobody waits for it."""


PATIENCE = 60.0
"""Seconds that rank 0 tries to get a lock before it tells the others that it still waits, so that none times out."""


def broadcast_from_rank0(value: T) -> T:
    """Return rank 0's value on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def on_rank0(action: Callable[[], T]) -> T:
    """Return on every rank what a call on rank 0 returned.

    Raises:
        Exception: what the call raised, on rank 0.
        Rank0Failed: it raised something, on the others, which end without a message of their own.
    """
    value: T | None = None
    error: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            value = action()
        except Exception as raised:  # whatever it is: the other ranks wait for this one
            error = raised
    failed, result = broadcast_from_rank0((error is not None, value))
    if error is not None:
        raise error
    if failed:
        raise Rank0Failed(1)
    return cast("T", result)


def all_gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in the order of ranks."""
    values = [value]
    if dist.is_initialized():
        values = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def rank0_lock(file: Path, reason: str) -> Iterator[bool]:
    """Hold a lock file on rank 0; another run may hold it for longer than ranks wait for each other.

    Args:
        file: the lock file.
        reason: why a run waits for the lock, for the log.

    Yields:
        Whether this is rank 0.
    """
    is_rank0 = not dist.is_initialized() or dist.get_rank() == 0
    lock = FileLock(file)
    if is_rank0:
        file.parent.mkdir(parents=True, exist_ok=True)
    tries = 0
    while not broadcast_from_rank0(is_rank0 and _acquire(lock)):
        if is_rank0 and not tries:
            log.info("Waiting for another run that holds %s: %s", file, reason)
        tries += 1
    try:
        yield is_rank0
    finally:
        lock.release()


def _acquire(lock: FileLock) -> bool:
    """Return whether the lock could be acquired within `PATIENCE`."""
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        return False
    return True


def close_process_group() -> None:
    """End the process group once every rank is here: one that exits while another works may make that one abort."""
    if not dist.is_initialized():
        return
    dist.barrier()
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    if deepspeed_comm is not None and deepspeed_comm.is_initialized():
        deepspeed_comm.destroy_process_group()  # DeepSpeed keeps groups in modules, and lets go of them here
    else:
        dist.destroy_process_group()
