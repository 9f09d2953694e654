"""Packed rows on two ranks, the vocabulary in pieces: the losses of one padded process, and the same after a stop."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import losses
from tests.train.step.test_step_packing import read_steps
from tests.train.test_distributed_runs import launch
from vlm.models import text_loss

WORDS = [
    "trainer.learning_rate.language_model_learning_rate=1e-3",
    "trainer.num_train_epochs=2",
    "trainer.save_strategy=steps",
    "trainer.save_steps=3",
    "trainer.num_samples=0",
]
SINGLE = ["trainer.per_device_train_batch_size=3", "trainer.gradient_accumulation_steps=4"]
TWO = [
    "trainer.per_device_train_batch_size=3",
    "trainer.gradient_accumulation_steps=2",
    "trainer.packing=true",
    "trainer.max_tokens_per_batch=140",
]
"""Each step has four micro-batches, which one process accumulates; two ranks have rows of 140 tokens at most."""


def test_two_ranks_make_the_padded_steps(common: list[str], train: Callable[..., Path], tmp_path: Path):
    """PyTorch's own data parallelism: losses and gradient norms, some rows without images, more rows than batches."""
    words = [*WORDS, "trainer.loss_average=micro_batch", "trainer.save_strategy=no", "trainer.num_train_epochs=1"]
    single = train("finetune-smol", tmp_path / "single", *words, *SINGLE)
    launch(["-cn", "finetune-smol", *common, *words, *TWO, f"trainer.output_dir={tmp_path / 'two'}"])
    assert len(read_steps(single)) == 2
    assert read_steps(tmp_path / "two") == [pytest.approx(step, rel=1e-5, abs=1e-5) for step in read_steps(single)]


@pytest.mark.slow
@pytest.mark.parametrize("average", ["token", "micro_batch"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_reach_the_single_process(
    common: list[str], train: Callable[..., Path], tmp_path: Path, stage: str, average: str
):
    words = [*WORDS, f"trainer.loss_average={average}", "trainer.num_train_epochs=3"]
    single = train("finetune-smol", tmp_path / "single", *words, *SINGLE)
    two = tmp_path / "two"
    words = ["-cn", "finetune-smol", *common, *words, *TWO, f"trainer.deepspeed={stage}", f"trainer.output_dir={two}"]
    launch(words, "tests.train.step.small_pieces")
    assert len(losses(single)) == 6
    assert losses(two) == pytest.approx(losses(single), abs=2e-4)
    shutil.rmtree(two / "checkpoint-6")
    shutil.rmtree(two / "final")
    launch(words, "tests.train.step.small_pieces")
    assert losses(two) == pytest.approx(losses(single), abs=2e-4)


@pytest.mark.slow
def test_two_ranks_read_a_stream_in_equally_many_rows(common: list[str], train: Callable[..., Path], tmp_path: Path):
    """Where one rank's samples need more rows than the other's, that one has rows without samples."""
    words = [
        "-cn",
        "finetune-smol",
        *common,
        *WORDS,
        *TWO,
        "dataset.streaming=true",
        "dataset.max_length=140",
        "dataset.over_length=skip",
        "trainer.max_steps=3",
        "trainer.train_sampling_strategy=random",
        "trainer.loss_average=micro_batch",
    ]
    launch([*words, f"trainer.output_dir={tmp_path / 'packed'}"])
    padded = [word for word in words if not word.startswith("trainer.max_tokens")] + ["trainer.packing=false"]
    launch([*padded, f"trainer.output_dir={tmp_path / 'padded'}"])
    assert read_steps(tmp_path / "packed") == [
        pytest.approx(step, rel=1e-5, abs=1e-5) for step in read_steps(tmp_path / "padded")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_rows_out_of_all_samples_reach_the_single_process(
    common: list[str], train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    """Each step has the packs that two accumulated batches of one process have; some are without images."""
    monkeypatch.setattr(text_loss, "MAX_LOGITS", 2**26)
    best_fit = [
        *WORDS,
        "trainer.packing=true",
        "trainer.packing_strategy=best_fit",
        "trainer.max_tokens_per_batch=180",
        "trainer.train_sampling_strategy=random",
    ]
    single = train("finetune-smol", tmp_path / "single", *best_fit, "trainer.gradient_accumulation_steps=2")
    two = tmp_path / "two"
    words = ["-cn", "finetune-smol", *common, *best_fit, f"trainer.deepspeed={stage}", f"trainer.output_dir={two}"]
    launch(words, "tests.train.step.small_pieces")
    assert len(losses(single)) > 4
    assert losses(two) == pytest.approx(losses(single), abs=2e-4)
    for late in two.glob("checkpoint-*"):
        if late.name != "checkpoint-3":
            shutil.rmtree(late)
    shutil.rmtree(two / "final")
    launch(words, "tests.train.step.small_pieces")
    assert losses(two) == pytest.approx(losses(single), abs=2e-4)
