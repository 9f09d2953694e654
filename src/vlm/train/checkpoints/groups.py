"""Which ranks share a folder: all of them, or those of a node if each node has its own disk."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from vlm.train.distributed import all_gather_objects

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """The ranks that share a folder with this one.

    Attributes:
        rank: this rank.
        members: the ranks of the group, this one included, in order.
    """

    rank: int
    members: tuple[int, ...]

    @property
    def index(self) -> int:
        """This rank's place among the members."""
        return self.members.index(self.rank)

    def gather(self, value: T) -> list[T]:
        """Return the values of all members; called on every rank of the world."""
        return [other for rank, other in enumerate(all_gather_objects(value)) if rank in self.members]

    def take_share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's share of the items that the group works through."""
        return list(items[self.index :: len(self.members)])


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def group_by_leaders(*, is_leader: bool) -> RankGroup:
    """Return the group of this rank: a leader and the ranks after it, up to the next leader."""
    rank, world_size = rank_and_world_size()
    leaders = [number for number, leads in enumerate(all_gather_objects(is_leader)) if leads]
    first = max((leader for leader in leaders if leader <= rank), default=0)
    end = min((leader for leader in leaders if leader > rank), default=world_size)
    return RankGroup(rank, tuple(range(first, end)))


def group_by_value(value: Hashable) -> RankGroup:
    """Return the group of the ranks that have the same value as this one."""
    rank, _ = rank_and_world_size()
    values = all_gather_objects(value)
    return RankGroup(rank, tuple(number for number, other in enumerate(values) if other == value))
