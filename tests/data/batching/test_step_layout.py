"""Rows of a step: its samples and no other, of like cost, equally many on every rank, and never longer than allowed."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.data.batching.test_best_fit import drawn_lengths
from vlm.data.batching.collator import SKIPPED_KEY, Collator
from vlm.data.batching.packing import SEQUENCE_STARTS
from vlm.data.batching.step_layout import (
    MICRO_BATCH,
    MORE_ROWS,
    MicroBatchCollator,
    RowCollator,
    RowDataset,
    SampleCosts,
    fill_rows,
    get_rows,
    lay_out_step,
)
from vlm.data.skipped import Skipped

COSTS = SampleCosts(token=6.0 * 576, pair=1.0)
GONE = Skipped(1, "x", "no image", None, "file")


def draw_step(num_micro_batches: int, size: int, seed: int = 0) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Micro-batches of drawn samples, the last of them short, and lengths and costs of all samples."""
    lengths = drawn_lengths(2000)
    drawn = np.random.default_rng(seed).permutation(len(lengths))[: num_micro_batches * size].tolist()
    batches = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    batches[-1] = batches[-1][: max(size // 2, 1)]
    return batches, lengths, COSTS.of(lengths, np.zeros(len(lengths)))


@pytest.mark.parametrize("max_tokens", [None, 2048, 4096])
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 3), (8, 2), (3, 5)])
def test_a_step_is_laid_out_whole_and_evenly(num_ranks: int, accumulation: int, max_tokens: int | None):
    batches, lengths, costs = draw_step(num_ranks * accumulation, 16)
    ranks = lay_out_step(batches, lengths, costs, num_ranks=num_ranks, max_tokens=max_tokens)
    assert [len(steps) for steps in ranks] == [accumulation] * num_ranks
    for steps in zip(*ranks, strict=True):  # ranks make the same calls
        assert len({len(rows) for rows in steps}) == 1
        assert steps[0]
    rows = [row for steps in ranks for rows in steps for row in rows]
    found = sorted((number, index) for row in rows for index, number in row)
    assert found == sorted((number, index) for number, batch in enumerate(batches) for index in batch)
    tokens = [int(lengths[[index for index, _ in row]].sum()) for row in rows]
    assert max(tokens) <= (max_tokens or sum(tokens))
    if max_tokens is None:
        assert len(rows) == len(batches)
        totals = [sum(costs[index] for rows in steps for row in rows for index, _ in row) for steps in ranks]
        assert max(totals) <= 1.05 * np.mean(totals)
        assert max(tokens) <= max(len(batch) * lengths[batch].max() for batch in batches)  # positions once padded


def test_rows_cost_about_the_same_where_images_and_long_samples_cost_more():
    lengths, images = np.array([900, 100, 100, 100, 100, 100, 100, 100, 100]), np.array([0, 1, 1, 1, 1, 0, 0, 0, 0])
    costs = SampleCosts(token=1.0, pair=0.002, image=400.0).of(lengths, images)
    assert costs.tolist() == pytest.approx([1710.9] + [510.1] * 4 + [110.1] * 4)
    rows = fill_rows(lengths.tolist(), costs.tolist(), fewest=2)
    assert rows == [[0, 5, 6, 7], [1, 2, 3, 4, 8]]


def test_few_long_samples_leave_rows_of_other_ranks_empty():
    """Of three samples that fill a row each, two ranks get two rows."""
    ranks = lay_out_step([[0, 1], [2]], np.array([9, 9, 9]), np.ones(3), num_ranks=2, max_tokens=10)
    assert [[len(row) for row in rows] for (rows,) in ranks] == [[1, 1], [1, 0]]


def test_samples_without_room_go_into_further_rows():
    assert fill_rows([6, 6, 4, 4], [6, 6, 4, 4], fewest=1, max_tokens=10) == [[0, 2], [1, 3]]
    assert fill_rows([6, 6, 6], [1, 1, 1], fewest=1, max_tokens=10) == [[0], [1], [2]]
    assert fill_rows([6, 6, 6], [1, 1, 1], fewest=2, multiple=2, max_tokens=10) == [[0], [1], [2], []]
    assert fill_rows([], [], fewest=1) == [[]]


class Numbers:
    """Samples that have their index as ids; some records are gone."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        ids = [index + 1] * self.lengths[index]
        return {"input_ids": ids, "labels": list(ids)} if ids else GONE


def test_rows_are_read_and_say_which_micro_batch_each_token_is_of():
    dataset: Any = RowDataset(Numbers([3, 0, 2, 4]))  # pyright: ignore[reportArgumentType]
    assert len(dataset) == 4
    dummy = ([9, 9], {"pixel_values": torch.zeros(1, 3, 2, 2)})
    collate = RowCollator(Collator(0, dummy, with_stats=True))
    batch: Any = collate([dataset[[(0, 1), (2, 0)]], dataset[[(1, 0)]], dataset[[(3, 2), (1, 1)]]])
    assert len(get_rows(batch)) == 3
    assert batch["input_ids"].tolist() == [[1, 1, 1, 3, 3, 9, 9]]  # and the dummy image, which nothing is learned from
    assert batch[MICRO_BATCH].tolist() == [[1, 1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 1, 1, -100, 3, -100, -100]]
    empty, last = batch[MORE_ROWS]
    assert MICRO_BATCH not in empty
    assert (empty["labels"] == -100).all()
    assert empty[SKIPPED_KEY] == last[SKIPPED_KEY] == [GONE]
    assert last[MICRO_BATCH][last["labels"] != -100].tolist() == [2, 2, 2]
    alone: Any = collate([dataset[[(0, 1)]]])
    assert MORE_ROWS not in alone
    assert get_rows(alone) == [alone]


def test_a_micro_batch_of_a_stream_fills_as_few_rows_as_it_may():
    samples = [*map(Numbers([5, 4, 3, 2]).__getitem__, range(4)), GONE]
    whole: Any = MicroBatchCollator(RowCollator(Collator(0)), COSTS, None)(samples)
    assert whole[SEQUENCE_STARTS].tolist() == [0, 5, 9, 12, 14]
    assert whole[SKIPPED_KEY] == [GONE]
    parts: Any = MicroBatchCollator(RowCollator(Collator(0)), COSTS, 7)(samples)
    assert [row[SEQUENCE_STARTS].tolist() for row in get_rows(parts)] == [[0, 5, 7], [0, 4, 7]]
    assert MICRO_BATCH not in parts
    assert get_rows(MicroBatchCollator(RowCollator(Collator(0)), COSTS, 7)([GONE]))[0][SKIPPED_KEY] == [GONE]
