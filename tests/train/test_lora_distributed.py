"""Adapters on two ranks on the CPU: ZeRO-2 and ZeRO-3 reach the single process's losses, and resume."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import losses
from tests.train.test_distributed_runs import launch
from vlm.assembly.adapter_folder import ADAPTER_WEIGHTS, NON_LORA_WEIGHTS
from vlm.assembly.checkpoint import open_checkpoint

LORA = [
    "trainer.lora.language_model.r=4",
    "trainer.lora.visual_encoder.r=2",
    "trainer.lora.use_dora=true",
    "trainer.learning_rate.language_model_learning_rate=1e-2",
    "trainer.learning_rate.visual_encoder_learning_rate=1e-2",
    "trainer.max_steps=4",
    "trainer.train_sampling_strategy=sequential",
    "trainer.save_strategy=steps",
    "trainer.save_steps=2",
]


@pytest.fixture(scope="module")
def pretrained(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of every run here."""
    return train("pretrain-smol", tmp_path_factory.mktemp("runs") / "pretrain", "trainer.max_steps=1") / "final"


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_ranks_reach_the_single_process(
    common: list[str], train: Callable[..., Path], pretrained: Path, tmp_path: Path, stage: str
):
    """Losses, the saved adapter beside its connector, and the resumed second half are the same."""
    words = [*LORA, f"trainer.from_pretrained={pretrained}"]
    single = train("pretrain-smol", tmp_path / "single", *words)
    sharded = tmp_path / "sharded"
    words = ["-cn", "pretrain-smol", *common, *words, f"trainer.deepspeed={stage}", f"trainer.output_dir={sharded}"]
    words.append("trainer.per_device_train_batch_size=4")
    launch(words)
    assert losses(sharded) == pytest.approx(losses(single), abs=2e-4)
    saved = {name: load_file(sharded / "final" / name) for name in (ADAPTER_WEIGHTS, NON_LORA_WEIGHTS)}
    for name, tensors in saved.items():
        torch.testing.assert_close(tensors, load_file(single / "final" / name), rtol=0, atol=5e-3)
    shutil.rmtree(sharded / "checkpoint-4")
    shutil.rmtree(sharded / "final")
    launch(words)
    assert losses(sharded) == pytest.approx(losses(single), abs=2e-4)
    for name, tensors in saved.items():
        torch.testing.assert_close(load_file(sharded / "final" / name), tensors, rtol=0, atol=1e-6)
    open_checkpoint(sharded / "final").load_model()
