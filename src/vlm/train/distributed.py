"""What the ranks of a run tell each other; without other ranks, each of these has nothing to do."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds that rank 0 tries to get a lock before it tells the others that it still waits: no rank gives them up."""


def broadcast_from_rank0(value: T) -> T:
    """A value as rank 0 has it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def all_gather_objects(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks."""
    every: list[Any] = [value]
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, value)
    return every


def barrier() -> None:
    """Until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def rank0_lock(file: Path, reason: str) -> Iterator[bool]:
    """Rank 0 holds a lock, which another run may have for longer than ranks wait for each other.

    Args:
        file: the lock.
        reason: why it is waited for, for the log.

    Yields:
        Whether this is rank 0.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    lock = FileLock(file)
    if first:
        file.parent.mkdir(parents=True, exist_ok=True)
    tries = 0
    while not broadcast_from_rank0(first and _acquire(lock)):
        if first and not tries:
            log.info("Waiting for another run, which holds %s: %s", file, reason)
        tries += 1
    try:
        yield first
    finally:
        lock.release()


def _acquire(lock: FileLock) -> bool:
    """Whether a lock is held after some patience."""
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        return False
    return True
