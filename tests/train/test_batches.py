"""Batches on their way to the model: copied while it computes, and each evaluation of its own records."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests.fixtures import compose_config
from vlm.train.arguments import training_arguments
from vlm.train.trainer import VLMTrainer


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["trainer.dataloader_pin_memory=false"], False),
        (["trainer.accelerator_config={non_blocking: false}"], False),
    ],
)
def test_batches_are_copied_while_the_device_computes(common: list[str], words: list[str], expected: bool):
    arguments: Any = training_arguments(compose_config("pretrain-smol", [*common, *words]).trainer)
    pinned = arguments.dataloader_pin_memory
    assert arguments.accelerator_config.non_blocking == (expected and pinned)


def test_loaders_of_our_own_copy_so_too(monkeypatch: pytest.MonkeyPatch):
    waited = []

    def to(self: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        waited.append(not options.get("non_blocking"))
        return self

    monkeypatch.setattr(Trainer, "_prepare_inputs", lambda self, inputs: inputs)
    monkeypatch.setattr(torch.Tensor, "to", to)
    inputs = {"input_ids": torch.ones(1, 2), "max_length_q": 2}
    for pinned in (True, False):
        trainer: Any = VLMTrainer.__new__(VLMTrainer)
        trainer.watchdog = None
        trainer.args = SimpleNamespace(device=torch.device("cpu"), dataloader_pin_memory=pinned)
        found = trainer._prepare_inputs(dict(inputs))
        assert found.keys() == inputs.keys()
    assert waited == [False, True]


def test_persistent_workers_do_not_show_records_for_blank_pictures(train: Callable[..., Path], tmp_path: Path):
    """Each evaluation makes a loader of its own."""
    words = ["trainer.max_steps=2", "trainer.num_samples=0", "trainer.eval_strategy=steps", "trainer.eval_steps=1",
             "dataset.eval_split=0.25"]  # fmt: skip
    found = []
    for name, more in (
        ("plain", []), ("kept", ["trainer.dataloader_num_workers=1", "trainer.dataloader_persistent_workers=true"])
    ):  # fmt: skip
        folder = train("pretrain-smol", tmp_path / name, *words, *more)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([line["eval_image_gain"] for line in lines if "eval_image_gain" in line])
    assert len(found[0]) == 2
    assert 0.0 not in found[0]
    assert found[1] == pytest.approx(found[0], abs=1e-6)
