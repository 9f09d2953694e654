"""Where a stream of records is: in which file of an epoch, and at which place in it."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from vlm.data.sample import BadSample

File = TypeVar("File")
Raw = TypeVar("Raw")
T = TypeVar("T")

END = sys.maxsize
"""The place after all records of a file."""


class Position(NamedTuple):
    """The place after a record: a byte of its file, or the number of records before the place.

    `file` counts the files that a reader reads in an epoch, in the order in which it reads them.
    """

    file: int
    place: int


START = Position(0, 0)


def read_shard(
    files: Sequence[File],
    read: Callable[[File, int], Iterator[tuple[Raw | BadSample, int]]],
    parse: Callable[[Raw], object],
    *,
    shard: int = 0,
    num_shards: int = 1,
    seed: int | None = None,
    start: Position = START,
) -> Iterator[tuple[object, Position]]:
    """Read the records of a shard: some of the files if there are enough files, else some records of every file.

    Args:
        files: all files.
        read: iterates over what a file holds from a place on, each with the place after it.
        parse: makes a record of it; one that raises `BadSample` counts as a record, too.
        shard: the number of the shard, from 0.
        num_shards: number of shards.
        seed: shuffles the files; None: they are read in order.
        start: where to begin: after a record of this shard, with the same files, seed and shards.

    Yields:
        Each record, or the `BadSample` in its place, with the position after it.
    """
    if seed is not None:
        files = random.Random(seed).sample(files, len(files))
    takes_files = len(files) >= num_shards
    if takes_files:
        files = files[shard::num_shards]
    num_passed = 0 if takes_files else num_shards - 1  # records of other shards between two of this one
    passing = shard if num_passed and start == START else num_passed
    for number in range(start.file, len(files)):
        place = start.place if number == start.file else 0
        if place == END:
            continue
        for raw, behind in read(files[number], place):
            if passing:
                passing -= 1
                continue
            passing = num_passed
            yield value_or_bad_sample(parse, raw), Position(number, behind)


def value_or_bad_sample(read: Callable[[Raw], T], raw: Raw | BadSample) -> T | BadSample:
    """Return the result of a function for an item, or the `BadSample` that it raises or that the item is."""
    try:
        return raw if isinstance(raw, BadSample) else read(raw)
    except BadSample as error:
        return error
