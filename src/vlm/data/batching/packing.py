"""Samples one behind the other in rows without padding: which ones share a row, in which order, and how rows are made.

Which samples stand together is settled once: drawn, but for the last ones of a row, which are those that fit best
(Krell et al. 2021, arXiv:2107.02027, compare packers). Every epoch, samples of equal length change places and rows are
shuffled: nearly another packing, with as many rows, so that an epoch has the same number of steps each time and a
resumed run finds its place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from vlm.data.batching.collator import Collator
from vlm.data.batching.stats import BATCH_STATS
from vlm.data.encoding.labels import IGNORE_INDEX

SEQUENCE_STARTS: Final = "cu_seq_lens_q"
"""The key that packed batches have: where each sample begins, and where the last one ends."""


Lengths = Sequence[int] | np.ndarray

DRAW_WHILE_FITS = 3.0
"""A row takes samples as they are drawn as long as so many of mean length fit."""


def pack_lengths(lengths: Lengths, capacity: int, seed: int = 0) -> list[list[int]]:
    """Groups of places whose lengths sum up to at most `capacity`, few of them.

    A group takes samples as they are drawn until few more fit, and is closed by the one or two that leave least room.

    Args:
        lengths: tokens of each sample.
        capacity: most tokens of a group.
        seed: of what is drawn.

    Raises:
        ValueError: a sample is longer than `capacity`.
    """
    array = np.asarray(lengths, dtype=np.int64)
    if len(array) and array.max() > capacity:
        raise ValueError(
            f"a sample of {array.max():,} tokens does not fit into trainer.max_tokens_per_batch={capacity}; raise it, "
            "or lower dataset.max_length and choose dataset.over_length=skip or truncate"
        )
    pool = _UnpackedSamples(array, np.random.default_rng(seed))
    packs = []
    while pool.number:
        chosen: list[int] = []
        room = capacity
        while room >= DRAW_WHILE_FITS * pool.mean and (place := pool.drawn(room)) is not None:
            chosen.append(place)
            room -= int(array[place])
        while found := pool.best_fitting_lengths(room):
            chosen += map(pool.take_of_length, found)
            room -= sum(found)
        packs.append(chosen)
    return packs


class _UnpackedSamples:
    """Samples that are in no pack yet.

    Args:
        lengths: `(samples,)`.
        draw: the order in which they are drawn.
    """

    def __init__(self, lengths: np.ndarray, draw: np.random.Generator):
        self.mean = float(lengths.mean()) if len(lengths) else 0.0
        self.number = len(lengths)
        self.lengths = lengths.tolist()
        self.order = draw.permutation(len(lengths)).tolist()
        self.next = 0
        self.waiting = [True] * len(lengths)
        self.counts = np.bincount(lengths)
        self.present = np.flatnonzero(self.counts)
        self.indices_by_length: dict[int, list[int]] = {int(length): [] for length in self.present}
        for place in self.order:
            self.indices_by_length[self.lengths[place]].append(place)

    def drawn(self, room: int) -> int | None:
        """Take out the next sample as they are drawn; None: it does not fit, or there is none."""
        while self.next < len(self.order) and not self.waiting[self.order[self.next]]:
            self.next += 1
        if self.next == len(self.order) or self.lengths[self.order[self.next]] > room:
            return None
        place = self.order[self.next]
        self._mark_packed(place)
        return place

    def take_of_length(self, length: int) -> int:
        """Take out a sample of a length."""
        same = self.indices_by_length[length]
        while not self.waiting[same[-1]]:
            same.pop()
        place = same.pop()
        self._mark_packed(place)
        return place

    def _mark_packed(self, place: int) -> None:
        length = self.lengths[place]
        self.waiting[place] = False
        self.number -= 1
        self.counts[length] -= 1
        if not self.counts[length]:
            self.present = self.present[self.present != length]

    def best_fitting_lengths(self, room: int) -> list[int]:
        """The one or two lengths that fill a room most; none where none fits."""
        present = self.present[: np.searchsorted(self.present, room, side="right")]
        if not len(present):
            return []
        other = np.searchsorted(present, room - present, side="right") - 1
        sums = np.where(other >= 0, present + present[other], 0)
        sums[(present == present[other]) & (self.counts[present] < 2)] = 0
        most = int(sums.argmax())
        if sums[most] > present[-1]:
            return [int(present[most]), int(present[other[most]])]
        return [int(present[-1])]


class PackSampler(Sampler[list[int]]):
    """Iterates over this rank's packs of an epoch; every rank has as many.

    Args:
        lengths: tokens of each sample.
        capacity: most tokens of a pack.
        seed: with the epoch, all that the order depends on.
        rank: which of the ranks this is.
        world_size: how many there are.

    Raises:
        ValueError: a sample is longer than a pack, or there are fewer samples than ranks.
    """

    def __init__(self, lengths: Lengths, capacity: int, seed: int, rank: int = 0, world_size: int = 1):
        self.lengths = np.asarray(lengths)
        self.capacity, self.seed, self.rank, self.world_size = capacity, seed, rank, world_size
        if len(self.lengths) < world_size:
            raise ValueError(f"trainer.packing=true: {len(self.lengths)} samples cannot be dealt to {world_size} ranks")
        self.packs = _even_packs(pack_lengths(self.lengths, capacity, seed), world_size)
        self.epoch = 0

    @property
    def fill_ratio(self) -> float:
        """The mean share of `capacity` that packs hold."""
        return float(self.lengths.sum()) / (len(self.packs) * self.capacity)

    def set_epoch(self, epoch: int) -> None:
        """The training loop says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.packs) // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng([self.seed, self.epoch])
        sample_at = _swap_equal_lengths(self.lengths, draw)
        order = draw.permutation(len(self.packs))
        return (sample_at[self.packs[number]].tolist() for number in order[self.rank :: self.world_size].tolist())


def _even_packs(packs: list[list[int]], world_size: int) -> list[list[int]]:
    """As many packs as ranks can share evenly: those of most samples are halved.

    Where each has one alone, the first ones stand twice, as in batches that are not packed.
    """
    whole = len(packs)
    while len(packs) % world_size:
        most = max(range(len(packs)), key=lambda number: len(packs[number]))
        if len(packs[most]) < 2:
            packs.append(packs[len(packs) - whole])
            continue
        packs[most], other = packs[most][::2], packs[most][1::2]
        packs.append(other)
    return packs


def _swap_equal_lengths(lengths: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """`(samples,)`: which sample stands at each place, samples of equal length having changed places."""
    drawn = draw.permutation(len(lengths))
    sample_at = np.empty(len(lengths), dtype=np.int64)
    sample_at[np.argsort(lengths, kind="stable")] = drawn[np.argsort(lengths[drawn], kind="stable")]
    return sample_at


def resolve_pack_capacity(max_tokens: int | None, batch_size: int, lengths: Lengths, longest: int = 0) -> int:
    """What `trainer.max_tokens_per_batch` stands for; None: on average as many samples as a padded batch has.

    At least as much as the longest sample has, of these and of others that may come.
    """
    array = np.asarray(lengths)
    return max_tokens or max(round(batch_size * float(array.mean())), int(array.max()), longest)


class PackingCollator:
    """Lays samples one behind the other in a single row; attention is told where each begins.

    Args:
        collate: lays out what belongs to images, and adds the dummies that a batch needs.
    """

    def __init__(self, collate: Collator):
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """`input_ids`, `labels` and `position_ids` `(1, T)`, and where samples begin as attention kernels take it.

        No sample predicts the first token of the next one. A dummy image is a sample of its own.
        """
        batch = self.collate(samples)
        mask = batch.pop("attention_mask").bool()
        placed = mask | (batch["input_ids"] != self.collate.pad_token_id)  # a dummy is attended by nothing
        lengths = [n for row in zip(mask.sum(1).tolist(), (placed & ~mask).sum(1).tolist(), strict=True) for n in row]
        lengths = [length for length in lengths if length]
        packed: dict[str, Any] = {
            "input_ids": batch.pop("input_ids")[placed][None],
            "labels": batch.pop("labels")[placed][None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
        starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        packed["labels"][0, starts[:-1].long()] = IGNORE_INDEX
        packed |= {SEQUENCE_STARTS: starts, "cu_seq_lens_k": starts}
        packed |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
        packed |= {name: self._flatten_rows(name, value, placed) for name, value in batch.items()}
        if BATCH_STATS in packed:
            packed[BATCH_STATS] = replace(packed[BATCH_STATS], positions=packed["input_ids"].numel())
        return packed

    def _flatten_rows(self, name: str, value: Any, placed: Tensor) -> Any:
        """An input of padded rows as that of the one row."""
        if name in self.collate.tokens:
            return value[placed][None]
        if name in self.collate.rows:
            return value.flatten(0, 1)[None]  # (rows, images, …) -> (1, rows * images, …)
        return value
