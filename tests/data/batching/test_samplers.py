"""The order of samples: LLaVA's to the index, batches of one modality, rows of like length, each sample once."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from vlm.data.batching.samplers import (
    EpochSampler,
    GroupSampler,
    ModalityBlockSampler,
    ModalityLengthSampler,
    order_by_modality_and_length,
    order_by_modality_blocks,
)

BATCH = 4
Samples = tuple[list[int], list[int]]
"""Lengths and numbers of images."""


def draw_samples(seen: int, text: int, longest: int = 900, seed: int = 0) -> Samples:
    """Lengths and numbers of images of so many samples with images and of text only, mixed."""
    draw = np.random.default_rng(seed)
    images = draw.permutation(np.concatenate([draw.integers(1, 4, seen), np.zeros(text, np.int64)]))
    return draw.integers(1, longest, seen + text).tolist(), images.tolist()


@pytest.fixture(params=[(400, 100), (37, 11), (3, 2), (50, 0), (0, 9), (1, 0)], ids=str)
def data(request) -> Samples:
    return draw_samples(*request.param)


def in_modality_order(data: Samples, seed: int = 0, num_chunks: int = 2) -> list[int]:
    return order_by_modality_and_length(*data, BATCH, num_chunks, torch.Generator().manual_seed(seed))


def in_block_order(data: Samples, seed: int = 0) -> list[int]:
    return order_by_modality_blocks(*data, BATCH, torch.Generator().manual_seed(seed))


both_orders = pytest.mark.parametrize("order", [in_modality_order, in_block_order])
Order = Callable[..., list[int]]


def batches(indices: list[int]) -> list[list[int]]:
    return [indices[start : start + BATCH] for start in range(0, len(indices), BATCH)]


# --- LLaVA's order, written down a second time, one sample after the other --------------------------------------------


def llava_order(lengths: list[int], batch_size: int, chunks: int, generator: torch.Generator) -> list[int]:
    """The order of LLaVA's code for lengths that are negative for text only, step by step as it is described.

    `batch_size` is a device's, and `chunks` the devices times accumulation steps.
    """
    seen = [index for index, length in enumerate(lengths) if length > 0]
    text = [index for index, length in enumerate(lengths) if length < 0]
    if not seen or not text:
        return [index for step in llava_steps(lengths, batch_size, chunks, generator) for index in step]
    seen_steps = llava_steps([lengths[index] for index in seen], batch_size, chunks, generator)
    text_steps = llava_steps([-lengths[index] for index in text], batch_size, chunks, generator)
    steps = [[seen[place] for place in step] for step in seen_steps[:-1]]
    steps += [[text[place] for place in step] for step in text_steps[:-1]]
    shuffled = [steps[number] for number in torch.randperm(len(steps), generator=generator).tolist()]
    mixed = [seen[place] for place in seen_steps[-1]] + [text[place] for place in text_steps[-1]]
    return [index for step in [*shuffled, sorted(mixed)] for index in step]


def llava_steps(lengths: list[int], batch_size: int, chunks: int, generator: torch.Generator) -> list[list[int]]:
    """Steps of one modality: a permutation in slices, each sorted and dealt to chunks."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * chunks
    steps = []
    for start in range(0, len(order), size):
        step = sorted(order[start : start + size], key=lambda index: lengths[index], reverse=True)
        if len(step) % chunks:
            steps.append([index for chunk in range(chunks) for index in step[chunk::chunks]])
            continue
        dealt: list[list[int]] = [[] for _ in range(chunks)]
        sums: list[float] = [0] * chunks
        for index in step:
            chunk = sums.index(min(sums))
            dealt[chunk].append(index)
            sums[chunk] = sums[chunk] + lengths[index] if len(dealt[chunk]) < len(step) // chunks else float("inf")
        steps.append([index for chunk in dealt for index in chunk])
    return steps


def check_llavas_order(data: Samples, batch_size: int, chunks: int, seed: int):
    signed = [length if images else -length for length, images in zip(*data, strict=True)]
    expected = llava_order(signed, batch_size, chunks, torch.Generator().manual_seed(seed))
    found = order_by_modality_and_length(*data, batch_size * chunks, chunks, torch.Generator().manual_seed(seed))
    assert found == expected


@pytest.mark.parametrize("longest", [4, 900])  # few lengths: many are equal
@pytest.mark.parametrize("numbers", [(0, 0), (1, 0), (0, 1), (1, 1), (5, 3), (37, 11), (64, 64), (128, 0), (0, 131)])
def test_the_order_is_llavas(numbers: tuple[int, int], longest: int):
    """Of any numbers: steps that are filled, that are not, and of one modality only."""
    for batch_size in (1, 3, 4, 16):
        for chunks in (1, 2, 6, 8):
            check_llavas_order(draw_samples(*numbers, longest), batch_size, chunks, seed=len(str(numbers)))


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_million_indices_are_in_llavas_order(ranks: int):
    """As many as a large mixture has, a twentieth of them text, 16 on each device."""
    check_llavas_order(draw_samples(950_000, 50_000, 2000), 16, ranks, seed=42)


def test_each_rank_gets_the_micro_batches_that_were_made_for_it():
    """As accelerate deals batches: micro-batch `m` of rank `r` is chunk `m * ranks + r` of its step."""
    ranks, accumulation, size = 2, 3, 4
    chunks = ranks * accumulation
    step = size * chunks
    lengths, images = draw_samples(5 * step, 2 * step)
    sampler = ModalityLengthSampler(lengths, images, step, 7, chunks)
    order = list(sampler)
    for rank in range(ranks):
        found = list(BatchSamplerShard(BatchSampler(sampler, size, False), ranks, rank))
        for number in range(5):
            for micro in range(accumulation):
                start = number * step + (micro * ranks + rank) * size
                assert found[number * accumulation + micro] == order[start : start + size]
    for start in range(0, 5 * step, step):  # evenly: no chunk is larger than another by more than its longest sample
        rows = [lengths[index] for index in order[start : start + step]]
        sums = [sum(rows[place : place + size]) for place in range(0, step, size)]
        assert max(sums) - min(sums) <= max(rows)


def test_lengths_do_not_decide_which_samples_a_step_has():
    """Counted in tokens or in words: the samples of each step are the same."""
    lengths, images = draw_samples(37, 23)
    first, second = (batches(in_modality_order((made, images))) for made in (lengths, lengths[::-1]))
    assert first != second
    assert [sorted(step) for step in first] == [sorted(step) for step in second]


def test_a_step_is_divided_evenly():
    with pytest.raises(ValueError, match="batch=6, num_chunks=4"):
        order_by_modality_and_length([1], [0], 6, 4, torch.Generator())


# --- what both orders have in common ---


@both_orders
def test_each_sample_once(data: Samples, order: Order):
    assert sorted(order(data)) == list(range(len(data[0])))


@both_orders
def test_whole_batches_are_of_one_modality(data: Samples, order: Order):
    """All but those at the end."""
    images = data[1]
    whole = sum(max((sum((number > 0) == seen for number in images) - 1) // BATCH, 0) for seen in (True, False))
    found = batches(order(data))
    assert all(len({images[index] > 0 for index in batch}) == 1 for batch in found[:whole])
    assert len(found) - whole <= 2


@both_orders
def test_batches_are_not_sorted_by_length(order: Order):
    """A run does not begin with its longest samples and end with its shortest."""
    lengths = list(range(1, 201))
    firsts = [batch[0] for batch in batches(order((lengths, [0] * 200)))]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


@both_orders
def test_the_seed_is_all_the_chance_there_is(data: Samples, order: Order):
    torch.manual_seed(5)
    first = order(data, seed=1)
    torch.manual_seed(6)
    assert order(data, seed=1) == first


@both_orders
def test_the_modalities_are_interleaved(order: Order):
    kinds = [index < 200 for index in order(([10] * 400, [1] * 200 + [0] * 200))][::BATCH]
    assert len(set(kinds[:50])) == 2
    assert kinds != sorted(kinds)


def test_blocks_pad_least():
    """A tenth of what chance would pad, and less than steps of like lengths that chance drew."""
    draw = random.Random(1)
    lengths = [draw.randint(10, 1000) for _ in range(400)]

    def padding(indices: list[int]) -> int:
        return sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches(indices) for j in batch)

    samples = lengths, [1] * 400
    assert padding(in_block_order(samples)) * 10 < padding(list(range(400)))
    assert padding(in_block_order(samples)) < padding(in_modality_order(samples))


@pytest.mark.parametrize("shares", [(1, 0), (0, 1), (1, 1), (1, 9)])
@pytest.mark.parametrize("number", [0, 1, 7, 24, 25, 96, 130])
def test_steps_that_are_measured_as_they_come_are_those_of_known_lengths(number: int, shares: tuple[int, int]):
    draw = random.Random(number)
    images = draw.choices((0, 1), shares, k=number)
    known = np.array([draw.randint(1, 9) for _ in range(number)], dtype=np.int64)
    lengths, asked = np.zeros(number, dtype=np.int64), list[int]()

    def measure(indices: Sequence[int]) -> None:
        """Fill in the lengths of a step."""
        asked.extend(indices)
        lengths[indices] = known[indices]

    for chunks in (1, 2, 3):
        lengths[:] = 0
        measured = ModalityLengthSampler(lengths, images, 12, 7, chunks, measure)
        order = iter(measured)
        first = [next(order) for _ in range(min(number, 3))]
        assert np.count_nonzero(lengths) <= 12
        assert [*first, *order] == list(ModalityLengthSampler(known, images, 12, 7, chunks))
    assert set(asked) <= set(range(number))


@pytest.mark.parametrize("kind", [ModalityLengthSampler, ModalityBlockSampler])
def test_epochs_differ_and_repeat_themselves(kind: Callable[..., EpochSampler[int]]):
    """Resuming an epoch repeats its order, in a new process too."""
    lengths, images = [random.Random(0).randint(1, 99) for _ in range(100)], [1, 0] * 50

    def epochs() -> list[list[int]]:
        sampler, found = kind(lengths, images, BATCH, seed=3), []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            found.append(list(sampler))
        return found

    first = epochs()
    assert first == epochs()
    assert first[0] != first[1] != first[2]
    assert all(sorted(indices) == list(range(100)) for indices in first)
    sampler = kind(lengths, images, BATCH, seed=3)
    assert list(sampler) == list(sampler) == first[0]
    assert len(sampler) == 100
    assert list(kind(lengths, images, BATCH, seed=4)) != first[0]


def test_samples_of_a_group_stand_together():
    groups = [0, 1, -1, 0, 2, 1, -1, 0]
    sampler = GroupSampler(groups, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(8))
    assert order == list(sampler)
    for group in (0, 1, 2):
        places = [place for place, index in enumerate(order) if groups[index] == group]
        assert places == list(range(places[0], places[0] + len(places)))
    sampler.set_epoch(1)
    assert list(sampler) != order
