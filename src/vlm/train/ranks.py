"""What the ranks of a run tell each other; without other ranks, each of these has nothing to do."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def as_first_rank(value: T) -> T:
    """A value as rank 0 has it."""
    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def gathered_objects(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks."""
    every: list[Any] = [value]
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, value)
    return every


def wait() -> None:
    """Until every rank is here."""
    if dist.is_initialized():
        dist.barrier()
