"""The order of samples: batches of one modality, rows of like length, each sample once."""

import random

import pytest
import torch

from vlm.data.batching.samplers import GroupSampler, ModalityLengthSampler, group_by_modality_and_length

BATCH = 4


@pytest.fixture(params=[(400, 100), (37, 11), (3, 2), (50, 0), (0, 9), (1, 0)], ids=str)
def data(request) -> tuple[list[int], list[int]]:
    """Lengths and numbers of images of so many samples with images and of text only, mixed."""
    seen, text = request.param
    draw = random.Random(0)
    samples = [(draw.randint(20, 900), draw.randint(1, 3)) for _ in range(seen)]
    samples += [(draw.randint(5, 900), 0) for _ in range(text)]
    draw.shuffle(samples)
    return [length for length, _ in samples], [images for _, images in samples]


def order(data: tuple[list[int], list[int]], seed: int = 0) -> list[int]:
    return group_by_modality_and_length(*data, BATCH, torch.Generator().manual_seed(seed))


def batches(indices: list[int]) -> list[list[int]]:
    return [indices[start : start + BATCH] for start in range(0, len(indices), BATCH)]


def test_each_sample_once(data):
    assert sorted(order(data)) == list(range(len(data[0])))


def test_whole_batches_are_of_one_modality(data):
    """Samples that fill no whole batch come last, mixed."""
    images = data[1]
    whole = sum(sum((number > 0) == seen for number in images) // BATCH for seen in (True, False))
    found = batches(order(data))
    assert all(len({images[index] > 0 for index in batch}) == 1 for batch in found[:whole])
    assert len(found) - whole <= 2


def test_rows_of_a_batch_are_of_like_length():
    """Padding is a fraction of what chance would give."""
    draw = random.Random(1)
    lengths = [draw.randint(10, 1000) for _ in range(400)]

    def padding(indices: list[int]) -> int:
        return sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches(indices) for j in batch)

    assert padding(order((lengths, [1] * 400))) * 10 < padding(list(range(400)))


def test_batches_are_not_sorted_by_length():
    """A run does not begin with its longest samples and end with its shortest."""
    lengths = list(range(200))
    firsts = [batch[0] for batch in batches(order((lengths, [0] * 200)))]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_the_seed_is_all_the_chance_there_is(data):
    torch.manual_seed(5)
    first = order(data, seed=1)
    torch.manual_seed(6)
    assert order(data, seed=1) == first


def test_the_modalities_are_interleaved():
    kinds = [index < 200 for index in order(([10] * 400, [1] * 200 + [0] * 200))][::BATCH]
    assert len(set(kinds[:50])) == 2
    assert kinds != sorted(kinds)


def test_epochs_differ_and_repeat_themselves():
    """Resuming an epoch repeats its order, in a new process too."""
    lengths, images = [random.Random(0).randint(1, 99) for _ in range(100)], [1, 0] * 50

    def epochs() -> list[list[int]]:
        sampler, found = ModalityLengthSampler(lengths, images, BATCH, seed=3), []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            found.append(list(sampler))
        return found

    first = epochs()
    assert first == epochs()
    assert first[0] != first[1] != first[2]
    assert all(sorted(indices) == list(range(100)) for indices in first)
    sampler = ModalityLengthSampler(lengths, images, BATCH, seed=3)
    assert list(sampler) == list(sampler) == first[0]
    assert len(sampler) == 100
    assert list(ModalityLengthSampler(lengths, images, BATCH, seed=4)) != first[0]


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
