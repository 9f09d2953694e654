"""Rows of about equal length, filled out of all samples: `trainer.packing_strategy=best_fit`.

The packing is computed once: a row takes samples in random order, and at last those that fit best (Krell et al. 2021,
arXiv:2107.02027, compare packers). Every epoch, samples of equal length are swapped and rows are shuffled. This is
almost a new packing, but with as many rows, so that every epoch has the same number of steps and a resumed run finds
its place.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from vlm.data.batching.packing import check_row_capacity
from vlm.data.batching.samplers import EpochSampler

Lengths = Sequence[int] | np.ndarray

DRAW_WHILE_FITS = 3.0
"""A row takes samples in random order as long as this many of mean length still fit."""


def pack_lengths(lengths: Lengths, capacity: int, seed: int = 0) -> list[list[int]]:
    """Pack samples into few groups of at most `capacity` tokens: the indices of each group's samples.

    A group takes samples in random order, which `seed` determines, until few more fit, then the one or two that leave
    the least room. Lengths are numbers of tokens.

    Raises:
        ValueError: a sample is longer than `capacity`.
    """
    array = np.asarray(lengths, dtype=np.int64)
    check_row_capacity(array, capacity)
    pool = _UnpackedSamples(array, np.random.default_rng(seed))
    packs = []
    while pool.number:
        pack: list[int] = []
        room = capacity
        while room >= DRAW_WHILE_FITS * pool.mean and (index := pool.take_next(room)) is not None:
            pack.append(index)
            room -= int(array[index])
        while fitting := pool.best_fitting_lengths(room):
            pack += map(pool.take_of_length, fitting)
            room -= sum(fitting)
        packs.append(pack)
    return packs


class _UnpackedSamples:
    """Samples that are in no pack yet."""

    def __init__(self, lengths: np.ndarray, generator: np.random.Generator):
        self.mean = float(lengths.mean()) if len(lengths) else 0.0
        self.number = len(lengths)
        self.lengths = lengths.tolist()
        self.order = generator.permutation(len(lengths)).tolist()
        self.next = 0
        self.unpacked = [True] * len(lengths)
        self.counts = np.bincount(lengths)
        self.present = np.flatnonzero(self.counts)
        self.indices_by_length: dict[int, list[int]] = {int(length): [] for length in self.present}
        for index in self.order:
            self.indices_by_length[self.lengths[index]].append(index)

    def take_next(self, room: int) -> int | None:
        """Take the next sample in random order; None if it does not fit, or none is left."""
        while self.next < len(self.order) and not self.unpacked[self.order[self.next]]:
            self.next += 1
        if self.next == len(self.order) or self.lengths[self.order[self.next]] > room:
            return None
        return self._take(self.order[self.next])

    def take_of_length(self, length: int) -> int:
        """Take a sample of a length."""
        same = self.indices_by_length[length]
        while not self.unpacked[same[-1]]:
            same.pop()
        return self._take(same.pop())

    def _take(self, index: int) -> int:
        length = self.lengths[index]
        self.unpacked[index] = False
        self.number -= 1
        self.counts[length] -= 1
        if not self.counts[length]:
            self.present = self.present[self.present != length]
        return index

    def best_fitting_lengths(self, room: int) -> list[int]:
        """Return the one or two lengths that leave the least room; none where no sample fits."""
        present = self.present[: np.searchsorted(self.present, room, side="right")]
        if not len(present):
            return []
        other = np.searchsorted(present, room - present, side="right") - 1
        sums = np.where(other >= 0, present + present[other], 0)
        sums[(present == present[other]) & (self.counts[present] < 2)] = 0
        best = int(sums.argmax())
        if sums[best] > present[-1]:
            return [int(present[best]), int(present[other[best]])]
        return [int(present[-1])]


class PackSampler(EpochSampler[list[int]]):
    """Iterates over this rank's packs of an epoch; every rank has the same number.

    Args:
        lengths: number of tokens of each sample.
        capacity: the most tokens of a pack.
        seed: see `EpochSampler`.
        rank: of this process.
        world_size: number of ranks.

    Raises:
        ValueError: a sample is longer than a pack, or there are fewer samples than ranks.
    """

    def __init__(self, lengths: Lengths, capacity: int, seed: int, rank: int = 0, world_size: int = 1):
        super().__init__(seed)
        self.lengths = np.asarray(lengths)
        self.capacity, self.rank, self.world_size = capacity, rank, world_size
        if len(self.lengths) < world_size:
            raise ValueError(f"trainer.packing=true: {len(self.lengths)} samples are too few for {world_size} ranks")
        self.packs = _even_packs(pack_lengths(self.lengths, capacity, seed), world_size)

    @property
    def fill_ratio(self) -> float:
        """The mean share of `capacity` that packs fill."""
        return float(self.lengths.sum()) / (len(self.packs) * self.capacity)

    def __len__(self) -> int:
        """Return the number of packs of this rank."""
        return len(self.packs) // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Return the packs of the epoch on this rank, each a list of indices of samples."""
        generator = np.random.default_rng([self.seed, self.epoch])
        sample_at = _swap_equal_lengths(self.lengths, generator)
        order = generator.permutation(len(self.packs))
        return (sample_at[self.packs[number]].tolist() for number in order[self.rank :: self.world_size].tolist())


def _even_packs(packs: list[list[int]], world_size: int) -> list[list[int]]:
    """Make the number of packs a multiple of the number of ranks: halve those of most samples.

    Where every pack has a single sample, the first packs are repeated, as in batches that are not packed.
    """
    original = len(packs)
    while len(packs) % world_size:
        largest = max(range(len(packs)), key=lambda number: len(packs[number]))
        if len(packs[largest]) < 2:
            packs.append(packs[len(packs) - original])
            continue
        packs[largest], other = packs[largest][::2], packs[largest][1::2]
        packs.append(other)
    return packs


def _swap_equal_lengths(lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Permute samples of equal length: `(samples,)`, the index of the sample that takes each one's place."""
    drawn = generator.permutation(len(lengths))
    sample_at = np.empty(len(lengths), dtype=np.int64)
    sample_at[np.argsort(lengths, kind="stable")] = drawn[np.argsort(lengths[drawn], kind="stable")]
    return sample_at


def resolve_pack_capacity(max_tokens: int | None, batch_size: int, lengths: Lengths, longest: int = 0) -> int:
    """Return `trainer.max_tokens_per_batch`, or where it is None, the tokens of a padded batch on average.

    The default is at least as large as the longest sample, and as `longest`.
    """
    array = np.asarray(lengths)
    return max_tokens or max(round(batch_size * float(array.mean())), int(array.max()), longest)
