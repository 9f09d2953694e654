"""Records shuffled in blocks: each once an epoch, and the same from any position on."""

from collections.abc import Iterator
from itertools import islice

import pytest

from vlm.data.block_shuffle import BlockPosition, BlockShuffle
from vlm.data.records.positions import Position

opened: list[tuple[int, Position]] = []


def open_epoch(number: int, epoch: int, start: Position) -> Iterator[tuple[object, Position]]:
    """Records `epoch.index`, whose positions are ten bytes apart."""
    opened.append((epoch, start))
    for index in range(start.place // 10, number):
        yield f"{epoch}.{index}", Position(0, (index + 1) * 10)


def shuffled(number: int, size: int, position: BlockPosition = BlockPosition()) -> BlockShuffle:  # noqa: B008
    return BlockShuffle(lambda epoch, start: open_epoch(number, epoch, start), size, "seed", position)


@pytest.mark.parametrize(("number", "size"), [(10, 4), (8, 4), (3, 4), (5, 1), (5, 0)])
def test_it_goes_on_from_anywhere(number: int, size: int):
    """A block of its own each time: it never reads what came before the current one."""
    stream, items, positions = shuffled(number, size), [], []
    for _ in range(3 * number):
        positions.append(stream.position)
        items.append(next(stream))
    for epoch in range(3):
        part = items[epoch * number : (epoch + 1) * number]
        assert sorted(part, key=str) == sorted((f"{epoch}.{index}" for index in range(number)), key=str)
    for taken, position in enumerate(positions):
        opened.clear()
        resumed = shuffled(number, size, position)
        assert list(islice(resumed, len(items) - taken)) == items[taken:]
        assert opened[0] == (position.epoch, position.start)
        assert position.place >= (taken % number - max(size, 1)) * 10


def test_records_are_shuffled_within_blocks_alone():
    items = [str(item) for item in islice(shuffled(100, 10), 100)]
    assert items != sorted(items, key=lambda item: int(item[2:]))
    for block in range(10):
        assert {int(item[2:]) // 10 for item in items[block * 10 : block * 10 + 10]} == {block}


def test_an_epoch_without_records_ends_it():
    with pytest.raises(StopIteration):
        next(shuffled(0, 4))
