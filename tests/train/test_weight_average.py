"""The moving average of the weights: its arithmetic, and what of a run has it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.fixtures import losses
from vlm.train.checkpoints.trained import TRAINED_WEIGHTS
from vlm.train.monitor.callbacks import read_metrics
from vlm.train.weight_average import AVERAGE_FILE, WeightAverage


def test_the_average_of_each_step_is_that_of_the_formula(tmp_path: Path):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, state = WeightAverage(model, 0.5, is_writer=True), SimpleNamespace(global_step=0)
    average.on_train_begin(None, state, None)  # pyright: ignore[reportArgumentType] - of the state only the step
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.add_(step)
        state.global_step = step
        average.on_step_end(None, state, None)  # pyright: ignore[reportArgumentType]
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert average.average.keys() == {"weight"}
    torch.testing.assert_close(average.average["weight"], expected)
    weights = model.weight.detach().clone()
    with average.in_place(), average.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, weights)
    average.save_to(tmp_path)
    other = WeightAverage(model, 0.5, is_writer=True)
    other.load_from(tmp_path)
    other.on_train_begin(None, state, None)  # pyright: ignore[reportArgumentType]
    assert torch.equal(other.average["weight"], average.average["weight"])
    average.on_train_end(None, state, None)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(model.weight.detach(), expected)
    (tmp_path / AVERAGE_FILE).unlink()
    with pytest.raises(ValueError, match=r"trainer.average_decay=0.5: .* lacks weights that train"):
        other.load_from(tmp_path)


def test_evaluations_and_final_have_the_average_and_a_resumed_run_goes_on_with_it(
    train: Callable[..., Path], tmp_path: Path
):
    options = [
        "trainer.average_decay=0.5", "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2",
        "trainer.eval_strategy=steps", "trainer.eval_steps=2", "dataset.eval_split=0.25", "trainer.num_samples=0",
        "trainer.keep_best=eval_loss",
    ]  # fmt: skip
    whole = train("finetune-smol", tmp_path / "whole", *options)
    again = train(
        "finetune-smol", tmp_path / "again", *options, f"trainer.resume_from_checkpoint={whole / 'checkpoint-2'}"
    )
    final, resumed = (load_file(folder / "final" / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(final[name], tensor) for name, tensor in resumed.items())
    average, weights = (load_file(whole / "checkpoint-4" / file) for file in (AVERAGE_FILE, TRAINED_WEIGHTS))
    assert all(torch.equal(final[name], tensor) for name, tensor in average.items())
    assert any(not torch.equal(weights[name], tensor) for name, tensor in average.items())
    best = load_file(whole / "best" / "model.safetensors")
    step = json.loads((whole / "best" / "best.json").read_text())["step"]
    expected = load_file(whole / f"checkpoint-{step}" / AVERAGE_FILE)
    assert all(torch.equal(best[name], tensor) for name, tensor in expected.items())
    plain = train("finetune-smol", tmp_path / "plain", *options[1:])
    assert losses(plain) == losses(whole)  # training itself is the same
    assert evaluation_losses(plain) != evaluation_losses(whole)


def evaluation_losses(folder: Path) -> list[float]:
    return [line["eval_loss"] for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line]
