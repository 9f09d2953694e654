"""Which worlds can go on from a checkpoint, and what is said where one cannot."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import compose_config
from vlm.train.checkpoints.world import World, find_world_problem, read_world

SAVED = World(ranks=2, sharding="zero3", batch_size=4, accumulation=1, loss_average="token", precision="bf16")


def problem(folder: Path, saved: World = SAVED, **changes: Any) -> str | None:
    saved.write(folder)
    assert read_world(folder) == saved
    return find_world_problem(folder, replace(saved, **changes))


def test_a_run_describes_its_world():
    words = ["dataset.path=x", "trainer.deepspeed=zero2", "trainer.per_device_train_batch_size=3", "trainer.bf16=true"]
    world = World.of(compose_config("pretrain-smol", words), 4, "token")
    assert (world.ranks, world.sharding, world.batch_size, world.precision) == (4, "zero2", 3, "bf16")
    sharded = compose_config("pretrain-smol", ["dataset.path=x", "trainer/sharding=fsdp2"])
    assert World.of(sharded, 2, "token").sharding == "fsdp2"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation": 3},  # the same ranks: no question of worlds
        {"ranks": 1, "accumulation": 2},
        {"ranks": 1, "batch_size": 8},
        {"ranks": 8, "batch_size": 1},
        {"sharding": "zero2"},
        {"sharding": "none"},
        {"sharding": "fsdp2", "ranks": 4, "batch_size": 2},
    ],
)
def test_other_worlds_with_as_many_samples_a_step_go_on(tmp_path: Path, changes: dict[str, Any]):
    assert problem(tmp_path, **changes) is None


@pytest.mark.parametrize(
    ("saved", "changes", "advice"),
    [
        ({}, {"ranks": 1}, "a step had 8 samples and would now have 4. Set trainer.gradient_accumulation_steps=2"),
        ({}, {"ranks": 1, "batch_size": 3}, "so that their product is 8"),
        ({}, {"ranks": 3}, "Choose a number of ranks that divides 8"),
        ({"loss_average": "micro_batch"}, {"ranks": 1, "batch_size": 8}, "trainer.per_device_train_batch_size=4"),
        ({"precision": "fp16"}, {"sharding": "zero2"}, "the loss scale of fp16 cannot be carried over"),
        ({}, {"sharding": "zero0"}, "zero0 in half precision cannot be converted"),
        ({"streams": True}, {"ranks": 1, "accumulation": 2}, "Resume on 2 rank(s)"),
        ({"packs_best_fit": True}, {"ranks": 1, "accumulation": 2}, "Resume on 2 rank(s)"),
    ],
)
def test_what_is_refused_says_what_to_do(tmp_path: Path, saved: dict[str, Any], changes: dict[str, Any], advice: str):
    message = problem(tmp_path, replace(SAVED, **saved), **changes)
    assert message is not None
    assert message.startswith(f"{tmp_path}: 2 rank(s) wrote it (sharding: zero3), this run has ")
    assert advice in message


def test_another_precision_is_another_layout_of_zero0(tmp_path: Path):
    saved = replace(SAVED, sharding="zero0", precision="float32")
    assert "zero0 in half precision cannot be converted" in str(problem(tmp_path, saved, precision="bf16"))
    assert problem(tmp_path, replace(SAVED, precision="float32"), precision="bf16") is None


def test_streams_and_best_fit_go_on_with_as_many_ranks(tmp_path: Path):
    assert problem(tmp_path, replace(SAVED, streams=True, packs_best_fit=True), sharding="zero2") is None


def test_checkpoints_of_earlier_versions_say_nothing(tmp_path: Path):
    assert read_world(tmp_path) is None
    assert find_world_problem(tmp_path, SAVED) is None


def test_other_steps_can_be_accepted(tmp_path: Path):
    replace(SAVED, loss_average="micro_batch").write(tmp_path)
    present = replace(SAVED, ranks=3, batch_size=5)
    assert find_world_problem(tmp_path, present) is not None
    assert find_world_problem(tmp_path, present, accepts_other_steps=True) is None


def test_layouts_depend_on_ranks_where_shards_do():
    def layouts(**changes: Any) -> int:
        world = replace(SAVED, **changes)
        return len({world.layout, replace(world, ranks=5).layout})

    assert [layouts(sharding=name) for name in ("none", "fsdp2", "zero1", "zero2", "zero3")] == [1, 1, 2, 2, 2]
    assert [layouts(sharding="zero0", precision=name) for name in ("float32", "bf16")] == [1, 2]
