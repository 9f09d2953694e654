"""Runs go on in another world: other ranks, other stages of ZeRO, or none, in the same order of data."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import losses
from tests.train.checkpoints.conftest import Differences
from tests.train.checkpoints.go_on import forget_after
from tests.train.test_distributed_runs import launch

FINETUNE = [
    "trainer.learning_rate.language_model_learning_rate=1e-3", "trainer.max_steps=6", "trainer.save_strategy=steps",
    "trainer.save_steps=2", "trainer.save_total_limit=5", "trainer.num_samples=0",
]  # fmt: skip
RESUME = "trainer.resume_from_checkpoint=true"


def batch(size: int, accumulation: int = 1) -> list[str]:
    return [
        f"trainer.per_device_train_batch_size={size}",
        f"trainer.gradient_accumulation_steps={accumulation}",
    ]


def test_an_unsharded_run_goes_on_in_every_world(differences: Differences):
    pairs = {pair: value for pair, value in differences.items() if pair[0].endswith("alone")}
    assert {("1-alone", "2-zero2"), ("2-alone", "1-zero3"), ("1-alone", "2-fsdp2")} <= pairs.keys()
    assert {pair: value for pair, value in pairs.items() if value > 1e-6} == {}


def test_a_run_on_two_ranks_goes_on_on_one(common: list[str], train: Callable[..., Path], tmp_path: Path):
    """ZeRO-2 on two, then one process without DeepSpeed: grouped by length, in a second epoch; and what is refused."""
    words = [*FINETUNE, "trainer.train_sampling_strategy=group_by_modality_length"]
    undisturbed = train("finetune-smol", tmp_path / "single", *words, *batch(4, 2))
    run = tmp_path / "run"
    launch(["-cn", "finetune-smol", *common, *words, *batch(4), "trainer.deepspeed=zero2", f"trainer.output_dir={run}"])
    forget_after(run, 4)
    with pytest.raises(ValueError, match=r"2 rank\(s\) wrote it .* Set trainer.gradient_accumulation_steps=2"):
        train("finetune-smol", run, *words, *batch(4), RESUME)
    train("finetune-smol", run, *words, *batch(4, 2), RESUME)
    assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_worlds_hand_a_run_on(common: list[str], train: Callable[..., Path], tmp_path: Path, precision: str):
    """Packed: each world goes on from the first checkpoint of the one before, and all train to the same end."""
    words = [*FINETUNE, f"trainer.bf16={str(precision == 'bf16').lower()}", "trainer.packing=true"]
    words += ["trainer.max_steps=8", "trainer.save_steps=1", "trainer.save_total_limit=20"]
    expected = losses(train("finetune-smol", tmp_path / "single", *words, *batch(4, 2)))
    run = tmp_path / "run"
    worlds = [
        [*batch(4), "trainer.deepspeed=zero2"],
        [*batch(2, 2), "trainer.deepspeed=zero3"],
        [*batch(4), "trainer.sharding=fsdp2"],
        [*batch(4), "trainer.deepspeed=zero1"],
        batch(4),
        [*batch(4), "trainer.deepspeed=zero3"],
        [*batch(4), "trainer.deepspeed=zero2"],
    ]
    for step, world in enumerate(worlds, start=1):
        command = ["-cn", "finetune-smol", *common, *words, *world, f"trainer.output_dir={run}"]
        launch(command if step == 1 else [*command, RESUME])
        assert losses(run) == pytest.approx(expected, abs=1e-4 if precision == "float32" else 3e-2), world
        forget_after(run, step)
    train("finetune-smol", run, *words, *batch(2, 4), RESUME)
    assert losses(run) == pytest.approx(expected, abs=1e-4 if precision == "float32" else 3e-2)
