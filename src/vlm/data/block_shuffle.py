"""Records in sequence, shuffled within blocks, so that the position of a stream is five numbers.

A buffer from which records are drawn one by one would have to be saved record by record. A block is read again from
where it begins.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vlm.data.records.positions import START, Position

OpenEpoch = Callable[[int, Position], Iterator[tuple[object, Position]]]
"""Opens the records of an epoch from a position on; each comes with the position after it."""


class BlockPosition(NamedTuple):
    """Where a shuffled stream is.

    Attributes:
        epoch: number of the epoch, from 0.
        file: the file of the position at which the current block begins.
        place: the place of that position.
        block: number of the block in its epoch, from 0.
        index: number of the block's records that have been taken.
    """

    epoch: int = 0
    file: int = START.file
    place: int = START.place
    block: int = 0
    index: int = 0

    @property
    def start(self) -> Position:
        """Where the block begins."""
        return Position(self.file, self.place)


class BlockShuffle:
    """Iterates over the records of a source, epoch after epoch, without end; those of a block in random order.

    While a block is taken, the next one is read, record by record.

    Args:
        open_epoch: opens the records.
        size: number of records of a block; 1 or less: the order stays as it is.
        seed: of the order in blocks.
        position: where to continue; defaults to the first record.

    Attributes:
        position: where the next record is.

    Iterating raises:
        StopIteration: an epoch has no record.
    """

    def __init__(self, open_epoch: OpenEpoch, size: int, seed: str, position: BlockPosition = BlockPosition()):  # noqa: B008
        self.open_epoch, self.size, self.seed = open_epoch, max(size, 1), seed
        self.position = position._replace(index=0)
        self._reader = open_epoch(position.epoch, position.start)
        self._read_to = position.start
        self._block: list[object] = []
        self._order: list[int] = []
        self._ahead: list[object] = []
        self._read_ahead(self.size)
        self._take_block()
        for _ in range(position.index):
            next(self)

    def __iter__(self) -> "BlockShuffle":
        return self

    def __next__(self) -> object:
        if self.position.index == len(self._block):
            self._begin_next_block()
        self._read_ahead(1)
        place = self._order[self.position.index]
        record, self._block[place] = self._block[place], None
        self.position = self.position._replace(index=self.position.index + 1)
        return record

    def _read_ahead(self, number: int) -> None:
        """Read some records of the next block, or as many as the epoch has."""
        while number and len(self._ahead) < self.size:
            record, behind = next(self._reader, (None, None))
            if behind is None:
                return
            self._ahead.append(record)
            self._read_to = behind
            number -= 1

    def _begin_next_block(self) -> None:
        position = self.position
        self._read_ahead(self.size)
        begins_at = self._ahead_begins_at
        self.position = BlockPosition(position.epoch, *begins_at, position.block + 1)
        if not self._ahead:
            self.position = BlockPosition(position.epoch + 1)
            self._reader = self.open_epoch(self.position.epoch, START)
            self._read_ahead(self.size)
            if not self._ahead:
                raise StopIteration
        self._take_block()

    def _take_block(self) -> None:
        """Let the block that was read ahead be the current one."""
        self._block, self._ahead = self._ahead, []
        self._ahead_begins_at = self._read_to
        self._order = list(range(len(self._block)))
        random.Random(f"{self.seed} {self.position.epoch} {self.position.block}").shuffle(self._order)
