"""What a teacher reads of a sample, and batches that hold it."""

import re

import pytest
import torch

from vlm.data.batching.collator import Collator
from vlm.data.sample import BadSample
from vlm.data.skipped import Skipped
from vlm.train.distillation.data import (
    TEACHER_INPUTS,
    TEACHER_ROWS,
    DistillationCollator,
    match_labels,
    supervised_ids,
)

NONE = -100


def test_nothing_predicts_the_first_token():
    assert supervised_ids([5, NONE, 6, 7]) == [6, 7]


@pytest.mark.parametrize(
    ("labels", "supervised", "matched"),
    [
        ([NONE, NONE, 4, 5], [4, 5], [NONE, NONE, 4, 5]),
        ([NONE, 4, NONE, 5, 6], [4, 5], [NONE, 4, NONE, 5, NONE]),  # the student's replies were cut
        ([4, 4, 5], [4, 5], [NONE, 4, 5]),
        ([NONE, 4], [], [NONE, NONE]),
    ],
)
def test_labels_are_matched_one_to_one(labels: list[int], supervised: list[int], matched: list[int]):
    assert match_labels(labels, supervised, "x") == matched


@pytest.mark.parametrize(
    ("labels", "message"),
    [([NONE, 4, 6], "from number 2 on: ids [6] instead of [5]"), ([NONE, 4], "from number 2 on: ids [] instead of [5]"),
     ([NONE, 9, 4, 5], "from number 1 on: ids [9, 4, 5] instead of [4, 5]")],
)  # fmt: skip
def test_other_ids_are_refused(labels: list[int], message: str):
    with pytest.raises(BadSample, match=re.escape(message)):
        match_labels(labels, [4, 5], "x")


def item(length: int, **more: object) -> dict[str, object]:
    return {"input_ids": list(range(length)), "labels": [NONE] * (length - 1) + [7], **more}


def test_batches_hold_rows_and_inputs_beside_the_students():
    """The dummy image of a batch without images is still there."""
    dummy = ([1, 1], {"pixel_values": torch.ones(1, 3, 2, 2)})
    plain = Collator(0, dummy)
    collate = DistillationCollator.around(plain, Collator(9))
    own = [item(3), item(5)]
    rows = [torch.full((1, 4), number, dtype=torch.uint8) for number in (1, 2)]
    inputs = [item(4), item(2)]
    left_out = Skipped(0, "x", "no reason", None, "y")
    samples = [own[0] | {TEACHER_ROWS: rows[0]}, left_out, own[1] | {TEACHER_ROWS: rows[1]}]
    batch, expected = collate(samples), plain([own[0], left_out, own[1]])
    assert batch.pop(TEACHER_ROWS).tolist() == [[1] * 4, [2] * 4]
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "labels", "pixel_values"))
    batch = collate([one | {TEACHER_INPUTS: other} for one, other in zip(own, inputs, strict=True)])
    assert batch[TEACHER_INPUTS]["input_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 9, 9]]
    assert TEACHER_INPUTS in samples[0] or TEACHER_ROWS in samples[0]  # a sample may be used again
    assert TEACHER_ROWS not in collate([left_out])
