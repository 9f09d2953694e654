"""Packs out of all samples: full, the same on every start, dealt evenly."""

import numpy as np
import pytest

from benchmarks.lengths import draw_records
from vlm.data.batching.best_fit import PackSampler, pack_lengths, resolve_pack_capacity


def drawn_lengths(number: int = 20_000, image_tokens: int = 576) -> np.ndarray:
    """Lengths of LLaVA-665k's records with their images, cut as its recipe does."""
    records = draw_records(number)
    return np.array([min(one.tokens + image_tokens * one.source.has_image, 2048) for one in records])


@pytest.mark.parametrize("capacity", [2048, 4096, 40_000_000])
def test_packs_hold_every_sample_once_and_no_more_than_fits(capacity: int):
    lengths = drawn_lengths()
    packs = pack_lengths(lengths, capacity)
    assert sorted(place for one in packs for place in one) == list(range(len(lengths)))
    assert max(lengths[one].sum() for one in packs) <= capacity
    assert pack_lengths([], capacity) == []


@pytest.mark.parametrize(("image_tokens", "capacity"), [(576, 8192), (576, 16384), (196, 4096), (196, 8192)])
def test_packs_are_full(image_tokens: int, capacity: int):
    assert PackSampler(drawn_lengths(image_tokens=image_tokens), capacity, seed=0).fill_ratio >= 0.98


def test_a_sample_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match=r"a sample of 9 tokens does not fit into trainer.max_tokens_per_batch=8"):
        pack_lengths([3, 9], 8)


def test_an_epoch_is_the_same_on_every_start_and_another_one_differs():
    lengths = drawn_lengths(500)
    first, again = PackSampler(lengths, 4096, seed=3), PackSampler(lengths, 4096, seed=3)
    again.set_epoch(0)
    assert list(first) == list(again)
    before = list(first)
    first.set_epoch(1)
    assert len(list(first)) == len(before) == len(first)
    assert {tuple(sorted(one)) for one in before} != {tuple(sorted(one)) for one in first}
    assert list(PackSampler(lengths, 4096, seed=4)) != before


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_an_epoch_evenly(world_size: int):
    lengths = drawn_lengths(400)
    for epoch in range(2):
        ranks = [PackSampler(lengths, 4096, 0, rank, world_size) for rank in range(world_size)]
        for one in ranks:
            one.set_epoch(epoch)
        dealt = [list(one) for one in ranks]
        assert {len(packs) for packs in dealt} == {len(ranks[0])}
        assert sorted(place for packs in dealt for one in packs for place in one) == list(range(len(lengths)))
        assert max(lengths[one].sum() for packs in dealt for one in packs) <= 4096


def test_samples_that_fill_a_row_each_are_dealt_evenly():
    """No rank gets a row with nothing in it: of five, three stand twice."""
    dealt = [list(PackSampler([60] * 5, 100, 0, rank, 4)) for rank in range(4)]
    assert [len(packs) for packs in dealt] == [2] * 4
    places = [place for packs in dealt for one in packs for place in one]
    assert (len(places), set(places)) == (8, set(range(5)))


def test_fewer_samples_than_ranks_are_an_error():
    with pytest.raises(ValueError, match="2 samples are too few for 3 ranks"):
        PackSampler([5, 5], 16, 0, 0, 3)
    assert [list(PackSampler([5, 5], 16, 0, rank, 2)) for rank in range(2)] in ([[[0]], [[1]]], [[[1]], [[0]]])


def test_the_capacity_is_what_a_batch_has_on_average():
    assert resolve_pack_capacity(None, 4, [10, 20, 30]) == 80
    assert resolve_pack_capacity(None, 1, [10, 20, 30]) == 30  # the longest has to fit
    assert resolve_pack_capacity(64, 4, [10, 20, 30]) == 64
