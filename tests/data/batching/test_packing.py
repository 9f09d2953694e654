"""Rows in which samples stand one behind the other."""

from itertools import pairwise

import torch

from vlm.data.batching.collator import SKIPPED_KEY, Collator
from vlm.data.batching.packing import BRANCHES, KEY_INDEX, Branches, PackingCollator
from vlm.data.batching.stats import BATCH_STATS
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.skipped import Skipped


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


def test_branches_stand_one_behind_the_other_and_attend_to_their_prompt():
    branching = item(5, 6, 7, 6, 8, 8, 6, 9, pixels=1) | {BRANCHES: Branches(1, (2, 3, 2))}
    batch = PackingCollator(Collator(0, with_stats=True))([item(3, 4), branching, item(2, 2, 2)])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7, 6, 8, 8, 6, 9, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 1, 2, 3, 1, 2, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 5, 8, 10, 13]
    assert batch["cu_seq_lens_k"].tolist() == [0, 2, 5, 9, 12, 15]
    assert batch[KEY_INDEX].tolist() == [0, 1, 2, 3, 4, 2, 5, 6, 7, 2, 8, 9, 10, 11, 12]
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 4)
    assert BRANCHES not in batch
    pairs_of_tokens = 3 + 6 + (3 * 4 // 2 + 3) + (2 * 3 // 2 + 2) + 6
    stats = batch[BATCH_STATS]
    assert (stats.squared_lengths + stats.tokens) / 2 == pairs_of_tokens


def test_a_dummy_does_not_shift_branches():
    dummy = ([1, 2, 2], {"pixel_values": torch.zeros(1, 3, 2, 2)})
    branching = item(5, 6, 7, 6, 8) | {BRANCHES: Branches(1, (2, 2))}
    batch = PackingCollator(Collator(0, dummy))([item(3, 4), branching])  # the dummy stands behind the shorter one
    assert batch["input_ids"].tolist() == [[3, 4, 1, 2, 2, 5, 6, 7, 6, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 1, 2]]
    assert batch[KEY_INDEX].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 8, 9]
