"""Orders of samples: by modality and length, or by groups; the same on every rank and at every start."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler

Item_co = TypeVar("Item_co", covariant=True)


class EpochSampler(Sampler[Item_co]):
    """An order that changes with each epoch; a resumed epoch repeats its order.

    Args:
        seed: determines the order, together with the epoch.
    """

    def __init__(self, seed: int):
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that begins."""
        self.epoch = epoch


def order_by_modality_and_length(
    lengths: Sequence[int] | np.ndarray,
    num_images: Sequence[int] | np.ndarray,
    batch: int,
    num_chunks: int,
    generator: torch.Generator,
) -> list[int]:
    """Return LLaVA's order: each step of one modality, its micro-batches of similar lengths, the steps shuffled.

    The samples of each modality are permuted and cut into steps of `batch`. Within a step, samples are sorted by
    length, longest first, and dealt to `num_chunks` micro-batches, each to the one with the smallest sum of lengths so
    far; the step is these micro-batches, one after the other. The last step of each modality, whole or not, comes at
    the very end: the samples of both, ordered by index. Where there is one modality only, steps stay where the
    permutation put them, and the last one is divided like any other; where that is text, it is sorted and summed by
    negative lengths, as there. So lengths decide which micro-batch of a step a sample is in, never which step.

    Indices and draws are those of `LengthGroupedSampler` in LLaVA's public code (`llava/train/llava_trainer.py`) with
    `group_by_modality`, whose lengths are negative for text only, if all its draws come from this generator.

    Args:
        lengths: `(samples,)`: length of each sample, at least 0.
        num_images: `(samples,)`: number of images of each sample; 0 is text only.
        batch: samples of a step, over all ranks and accumulation steps; a multiple of `num_chunks`.
        num_chunks: micro-batches of a step: ranks times accumulation steps.
        generator: the only source of randomness.

    Raises:
        ValueError: `batch` is no multiple of `num_chunks`.
    """
    if batch % num_chunks:
        raise ValueError(
            f"batch={batch}, num_chunks={num_chunks}: all micro-batches of a step must have the same number of samples"
        )
    arranged = _arrange_steps(np.asarray(num_images) > 0, batch, generator)
    length_array = arranged.sign * np.asarray(lengths, dtype=np.int64)
    parts = [_divide_evenly(arranged.steps, length_array, num_chunks).ravel()]
    if arranged.divides_rest:
        parts.append(_divide_evenly(arranged.rest[None], length_array, num_chunks).ravel())
    else:
        parts.append(arranged.rest)
    return np.concatenate(parts).tolist()


@dataclass(frozen=True)
class _ArrangedSteps:
    """The samples of each step of LLaVA's order, before lengths divide them into micro-batches.

    Attributes:
        steps: `(steps, samples)`: the samples of each whole step.
        rest: the samples after these.
        divides_rest: whether these are divided into micro-batches too.
        sign: what lengths are multiplied with.
    """

    steps: np.ndarray
    rest: np.ndarray
    divides_rest: bool
    sign: int


def _arrange_steps(is_multimodal: np.ndarray, batch: int, generator: torch.Generator) -> _ArrangedSteps:
    """Draw the samples of each step; arguments as of `order_by_modality_and_length`."""
    modalities = [group for group in (np.flatnonzero(is_multimodal), np.flatnonzero(~is_multimodal)) if len(group)]
    orders = [group[torch.randperm(len(group), generator=generator).numpy()] for group in modalities]
    sign = 1 if is_multimodal.any() else -1
    if len(orders) < 2:
        (order,) = orders or [np.empty(0, dtype=np.int64)]
        whole = len(order) // batch * batch
        return _ArrangedSteps(order[:whole].reshape(-1, batch), order[whole:], divides_rest=True, sign=sign)
    last = [(len(order) - 1) // batch * batch for order in orders]
    steps = np.concatenate([order[:number].reshape(-1, batch) for order, number in zip(orders, last, strict=True)])
    steps = steps[torch.randperm(len(steps), generator=generator).numpy()]
    rest = np.concatenate([order[number:] for order, number in zip(orders, last, strict=True)])
    return _ArrangedSteps(steps, np.sort(rest), divides_rest=False, sign=sign)


def _divide_evenly(steps: np.ndarray, lengths: np.ndarray, num_chunks: int) -> np.ndarray:
    """Order the samples of each step by micro-batch: `(steps, samples) -> (steps, samples)`."""
    number, size = steps.shape
    if not steps.size:
        return steps
    by_length = np.argsort(-lengths[steps], axis=1, kind="stable")  # equal lengths stay in the order of the permutation
    steps = np.take_along_axis(steps, by_length, axis=1)
    if size % num_chunks:
        return np.concatenate([steps[:, chunk::num_chunks] for chunk in range(num_chunks)], axis=1)
    chunk_size, rows = size // num_chunks, np.arange(number)
    divided = np.empty((number, num_chunks, chunk_size), dtype=steps.dtype)
    filled = np.zeros((number, num_chunks), dtype=np.int64)
    totals = np.zeros((number, num_chunks), dtype=np.int64)
    for samples in steps.T:  # (steps,): the longest of each step, then the second longest
        shortest = totals.argmin(axis=1)
        divided[rows, shortest, filled[rows, shortest]] = samples
        filled[rows, shortest] += 1
        totals[rows, shortest] += lengths[samples]
        is_full = filled[rows, shortest] == chunk_size
        totals[rows[is_full], shortest[is_full]] = np.iinfo(np.int64).max
    return divided.reshape(number, size)


class ModalityLengthSampler(EpochSampler[int]):
    """Iterates in the order of `order_by_modality_and_length`, which has the same arguments, save for two.

    Args:
        lengths: as there.
        num_images: as there; for the order, only which of them are 0 matters.
        batch: as there.
        seed: see `EpochSampler`.
        num_chunks: as there.
        measure: called with the indices of a step's samples before their lengths are read; None: all are known.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        num_images: Sequence[int] | np.ndarray,
        batch: int,
        seed: int,
        num_chunks: int = 1,
        measure: Callable[[Sequence[int]], object] | None = None,
    ):
        super().__init__(seed)
        self.lengths, self.num_images = np.asarray(lengths), np.asarray(num_images)
        self.batch, self.num_chunks, self.measure = batch, num_chunks, measure

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Return the indices of all samples in the order of the epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.measure is not None:
            return self._measure_steps(self.measure, generator)
        samples = self.lengths, self.num_images, self.batch
        return iter(order_by_modality_and_length(*samples, self.num_chunks, generator))

    def _measure_steps(self, measure: Callable[[Sequence[int]], object], generator: torch.Generator) -> Iterator[int]:
        """Yield the same indices; the samples of each step are measured when it comes."""
        arranged = _arrange_steps(self.num_images > 0, self.batch, generator)
        for step in (*arranged.steps, *([arranged.rest] if arranged.divides_rest else ())):
            measure(step.tolist())
            places, lengths = np.arange(len(step))[None], arranged.sign * self.lengths[step]
            yield from step[_divide_evenly(places, lengths, self.num_chunks)[0]].tolist()
        if not arranged.divides_rest:
            yield from arranged.rest.tolist()


def order_by_modality_blocks(
    lengths: Sequence[int] | np.ndarray, num_images: Sequence[int] | np.ndarray, batch: int, generator: torch.Generator
) -> list[int]:
    """Return an order in which each step is of one modality and of similar lengths, the steps shuffled.

    Samples are sorted by length within blocks of 50 steps, so that those of a step are more alike, and padded less,
    than in `order_by_modality_and_length`, where chance alone decides which samples a step has. Samples that fill no
    whole step come last, mixed. Arguments are those of `order_by_modality_and_length`.
    """
    steps: list[list[int]] = []
    rest: list[int] = []
    is_multimodal = np.asarray(num_images) > 0
    for chosen in (np.flatnonzero(is_multimodal), np.flatnonzero(~is_multimodal)):
        grouped = chosen[_sort_within_blocks(np.asarray(lengths)[chosen], batch, generator)].tolist()
        whole = len(grouped) // batch * batch
        steps += [grouped[i : i + batch] for i in range(0, whole, batch)]
        rest += grouped[whole:]
    order = torch.randperm(len(steps), generator=generator).tolist()
    return [index for number in order for index in steps[number]] + rest


def _sort_within_blocks(lengths: np.ndarray, batch: int, generator: torch.Generator) -> np.ndarray:
    """Shuffle, then sort by length (longest first) within blocks of 50 steps."""
    block = batch * 50
    order = torch.randperm(len(lengths), generator=generator).numpy()
    blocks = [order[i : i + block] for i in range(0, len(order), block)]
    return np.concatenate([order[:0], *(part[np.argsort(-lengths[part], kind="stable")] for part in blocks)])


class ModalityBlockSampler(EpochSampler[int]):
    """Iterates in the order of `order_by_modality_blocks`, which has the same arguments, save for the seed."""

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, num_images: Sequence[int] | np.ndarray, batch: int, seed: int
    ):
        super().__init__(seed)
        self.lengths, self.num_images, self.batch = np.asarray(lengths), np.asarray(num_images), batch

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Return the indices of all samples in the order of the epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(order_by_modality_blocks(self.lengths, self.num_images, self.batch, generator))


class GroupSampler(EpochSampler[int]):
    """Iterates over groups in random order, the samples of a group in sequence, for losses that compare them.

    Args:
        groups: the index of each sample's group; negative for a sample that has none and is a group by itself.
        seed: see `EpochSampler`.
    """

    def __init__(self, groups: Sequence[int], seed: int):
        super().__init__(seed)
        self.groups = list(groups)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        """Return the indices of all samples in the order of the epoch, those of a group together."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        members_by_group: dict[int, list[int]] = {}
        for index in torch.randperm(len(self.groups), generator=generator).tolist():
            group = self.groups[index]
            members_by_group.setdefault(group if group >= 0 else -1 - index, []).append(index)
        return (index for members in members_by_group.values() for index in members)
