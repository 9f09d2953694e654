"""Packs: full, the same on every start, dealt evenly; and rows in which samples stand one behind the other."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.lengths import draw_records
from vlm.data.batching.collator import SKIPPED_KEY, Collator
from vlm.data.batching.packing import PackingCollator, PackSampler, pack_lengths, resolve_pack_capacity
from vlm.data.batching.stats import BATCH_STATS
from vlm.data.dataset import Skipped
from vlm.data.encoding.labels import IGNORE_INDEX


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
    with pytest.raises(ValueError, match="2 samples cannot be dealt to 3 ranks"):
        PackSampler([5, 5], 16, 0, 0, 3)
    assert [list(PackSampler([5, 5], 16, 0, rank, 2)) for rank in range(2)] in ([[[0]], [[1]]], [[[1]], [[0]]])


def test_the_capacity_is_what_a_batch_has_on_average():
    assert resolve_pack_capacity(None, 4, [10, 20, 30]) == 80
    assert resolve_pack_capacity(None, 1, [10, 20, 30]) == 30  # the longest has to fit
    assert resolve_pack_capacity(64, 4, [10, 20, 30]) == 64


def item(*ids: int, supervised: int = 1, pixels: int = 0) -> dict:
    """A sample whose last tokens are supervised."""
    labels = [IGNORE_INDEX] * (len(ids) - supervised) + list(ids[len(ids) - supervised :])
    pictures = {"pixel_values": torch.full((pixels, 3, 2, 2), float(ids[0]))} if pixels else {}
    return {"input_ids": list(ids), "labels": labels, **pictures}


def test_samples_stand_one_behind_the_other():
    collate = PackingCollator(Collator(0, with_stats=True))
    batch = collate([item(5, 6, 7, pixels=1), item(8, 9, supervised=2), item(3, 4, 4, 3, pixels=2)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4, 4, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100, -100, -100, 3]]  # 8 is predicted by nothing
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5.0, 3.0, 3.0]
    assert "attention_mask" not in batch
    facts = batch[BATCH_STATS]
    assert (facts.samples, facts.tokens, facts.positions, facts.squared_lengths) == (3, 9, 9, 9 + 4 + 16)


def test_a_dummy_image_is_a_sample_of_its_own():
    dummy = ([1, 2, 2], {"pixel_values": torch.zeros(1, 3, 2, 2)})
    batch = PackingCollator(Collator(0, dummy, with_stats=True))([item(8, 9), item(5, 6, 7)])
    starts = batch["cu_seq_lens_q"].tolist()
    rows = [batch["input_ids"][0, start:end].tolist() for start, end in pairwise(starts)]
    assert sorted(rows) == [[1, 2, 2], [5, 6, 7], [8, 9]]
    assert (batch["labels"] != IGNORE_INDEX).sum() == 2
    assert batch[BATCH_STATS].tokens == 5
    assert batch[BATCH_STATS].positions == 8


def test_records_left_out_are_told_and_a_row_is_left_where_none_remain():
    gone = Skipped(1, "x", "no picture", None, "file")
    batch = PackingCollator(Collator(0, with_stats=True))([gone, item(5, 6)])
    assert batch["input_ids"].tolist() == [[5, 6]]
    assert batch[SKIPPED_KEY] == [gone]
    empty = PackingCollator(Collator(0, with_stats=True))([gone])
    assert empty["input_ids"].shape == (1, 1)
    assert (empty["labels"] == IGNORE_INDEX).all()
    assert empty[BATCH_STATS].samples == 0


def test_inputs_of_rows_and_of_tokens_follow():
    rows = [item(5, 6, 7), item(8, 9)]
    for one, number in zip(rows, (2, 1), strict=True):
        one["pixel_values"] = torch.full((1, number, 3, 2, 2), float(number))
        one["kinds"] = torch.arange(len(one["input_ids"]))
    batch = PackingCollator(Collator(0, rows=("pixel_values",), tokens=("kinds",)))(rows)
    assert batch["pixel_values"].shape == (1, 4, 3, 2, 2)  # the second sample's is filled up with a blank one
    assert batch["kinds"].tolist() == [[0, 1, 2, 0, 1]]
