"""Memory that runs out: what held it, and which keys lower it."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures import compose_config
from vlm.train.guards.memory import OutOfMemory, is_out_of_memory, list_remedies
from vlm.train.trainer import VLMTrainer

KINDS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "machine": RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_held_memory(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """At the second step, where there are optimiser states."""
    step = VLMTrainer.compute_loss

    def compute_loss(self: VLMTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            raise KINDS[kind]
        return step(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "compute_loss", compute_loss)
    with pytest.raises(OutOfMemory) as ended:
        train("pretrain-smol", tmp_path, "trainer.num_samples=0", "trainer.optim=adamw_torch")
    message = str(ended.value)
    for name in ("parameters", "gradients", "optimiser states", "activations"):
        assert f"{name} " in message
    assert "trainer.per_device_train_batch_size=4 with trainer.gradient_accumulation_steps=2" in message


def test_remedies_have_an_effect_and_an_order():
    words = ["dataset.path=x", "trainer.per_device_train_batch_size=1", "trainer.activation_checkpointing=true",
             "trainer.bf16=true", "trainer.deepspeed=zero3", "dataset.max_length=256"]  # fmt: skip
    left = list_remedies(compose_config("pretrain-smol", [*words, "trainer.dataloader_num_workers=0"]))
    assert not [remedy for remedy in left if "activation" in remedy or "bf16" in remedy or "zero" in remedy]
    left = list_remedies(compose_config("finetune-smol", ["dataset.path=x", "trainer/sharding=fsdp2"]))
    assert not [remedy for remedy in left if "deepspeed" in remedy]  # both would be refused
    keys = list_remedies(
        compose_config(
            "finetune-smol", ["dataset.path=x", "trainer.activation_checkpointing=false", "trainer.deepspeed=null"]
        )
    )
    places = [
        next(i for i, key in enumerate(keys) if name in key) for name in ("batch_size", "activation", "deepspeed")
    ]
    assert places == sorted(places)


def test_other_errors_are_not_about_memory():
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
