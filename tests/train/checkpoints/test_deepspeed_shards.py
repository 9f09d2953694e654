"""DeepSpeed's shards go on in every other world, and other checkpoints under DeepSpeed."""

from pathlib import Path

import pytest
import torch

from tests.train.checkpoints.conftest import Differences, find_differences
from vlm.train.checkpoints.deepspeed_shards import _cut

STAGES = ("zero0", "zero1", "zero2", "zero3")
TOLERANCE = 1e-6
"""Of weights below 1, after two steps."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_goes_on_in_every_world(differences: Differences, stage: str):
    """On one rank and two, at every stage, under FSDP2 and alone."""
    pairs = {pair: value for pair, value in differences.items() if pair[0].endswith(stage)}
    assert len(pairs) == 2 * (6 + 5)  # from one rank and from two: 6 ways on two ranks, 5 on one
    assert {pair: value for pair, value in pairs.items() if value > TOLERANCE} == {}


@pytest.mark.parametrize("stage", STAGES)
def test_every_world_goes_on_under_a_stage(differences: Differences, stage: str):
    pairs = {pair: value for pair, value in differences.items() if pair[1].endswith(stage)}
    assert {pair[0] for pair in pairs} >= {"2-fsdp2", "2-alone", "1-alone", "1-zero3"}
    assert {pair: value for pair, value in pairs.items() if value > TOLERANCE} == {}


@pytest.mark.slow
def test_three_ranks_and_two_go_on_from_each_other(tmp_path: Path):
    """Neither number divides the other, or any of the layers."""
    differences = find_differences(tmp_path, 3, 2, 3)
    assert len(differences) == 2 * 6 * 2 * 6
    assert {pair: value for pair, value in differences.items() if value > TOLERANCE} == {}


def test_slices_run_over_the_ends_of_tensors():
    tensors = list(torch.arange(10).split([4, 3, 3]))
    slices = [_cut(tensors, start, 4).tolist() for start in (0, 2, 6, 8, 10)]
    assert slices == [[0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9], [8, 9], []]
