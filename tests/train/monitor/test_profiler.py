"""A profile says where the time of a few steps went."""

import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tests.families.tiny_families import TINY, save_family
from tests.tiny_parts import Parts
from vlm.assembly.family import load_family_config, load_family_model
from vlm.models import VLMForConditionalGeneration
from vlm.train.monitor.profiler import LOSS, OTHER_ROW, part_modules, time_by_part
from vlm.train.trainer import VLMTrainer

SHORT = ["trainer.num_samples=0", "trainer.per_device_train_batch_size=2", "trainer.save_strategy=no"]
EVERYTHING = [
    "trainer.unfreeze.train_vision_model=true",
    "trainer.unfreeze.train_language_model=true",
    "trainer.learning_rate.visual_encoder_learning_rate=1e-3",
    "trainer.learning_rate.language_model_learning_rate=1e-3",
]


class Slow(torch.autograd.Function):
    """As it is, with work backward alone."""

    @staticmethod
    def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        square = torch.ones(400, 400)
        for _ in range(20):
            square = square @ square * 0
        return gradient + square[0, 0]


def test_a_gradient_belongs_to_the_part_whose_operation_it_is_of():
    value = torch.ones(4, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        with record_function("outer"):
            with record_function("inner"):
                one = Slow.apply(value)
            two = one * 2
        with record_function(LOSS):
            loss = two.sum()
        loss.backward()
    events = found.events() or []
    rows, whole, on_device = time_by_part(events, ["outer", "inner"])
    spent = {name: host for name, (host, _) in rows.items()}
    assert spent["inner backward"] > 5 * (spent["outer backward"] + spent["loss backward"])
    assert spent["outer forward"] > 0  # the time of the inner call is not in it
    outer = next(one for one in events if one.name == "outer")
    assert spent["outer forward"] + spent["inner forward"] == pytest.approx(outer.cpu_time_total)
    assert (whole, on_device) == (0.0, False)


def test_every_part_is_called_by_a_module_that_is_found(parts: Parts):
    model, _ = parts.model("clip", "llama")
    found = part_modules(model)
    assert found["visual_encoder"] == [model.visual_encoder]
    assert found["connector"] == [model.connector]
    assert found["language_model"] == [model.language_model]


def test_every_module_that_stands_for_a_part_of_a_family_is_called(tmp_path: Path):
    """A list of modules never is: its members are."""
    for name in TINY:
        save_family(name, tmp_path / name)
        config = load_family_config(str(tmp_path / name), "model.hf_name")
        model = load_family_model(str(tmp_path / name), config, dtype=torch.float32, attention="eager")
        found = part_modules(model)
        assert not any(isinstance(module, torch.nn.ModuleList) for modules in found.values() for module in modules)
        assert all(found.values())


def test_what_is_done_between_steps_is_no_steps_time(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Evaluation after the fifth step, and sample answers when the trace, cut short, ends: each takes much longer."""
    evaluate, generate = VLMTrainer.evaluate, VLMForConditionalGeneration.generate
    training_step = VLMTrainer.training_step
    started: list[float] = []
    slept: list[float] = []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        started.append(time.monotonic())
        return training_step(self, *args, **kwargs)

    def sleep() -> None:
        """Sleep for four times as long as all steps have taken so far, which other sleeps are no part of."""
        slept.append(4 * (time.monotonic() - started[0] - sum(slept)))
        time.sleep(slept[-1])

    def slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        sleep()
        return evaluate(self, *args, **kwargs)

    def slow_answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        sleep()
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "training_step", step)
    monkeypatch.setattr(VLMTrainer, "evaluate", slowly)
    monkeypatch.setattr(VLMForConditionalGeneration, "generate", slow_answer)
    folder = train(
        "pretrain-smol", tmp_path / "run", *SHORT, "trainer.num_samples=1", "trainer.max_steps=6",
        "trainer.profile=true", "trainer.eval_strategy=steps", "trainer.eval_steps=5", "dataset.eval_split=0.2",
    )  # fmt: skip
    lines = (folder / "profile" / "table.txt").read_text().split("\n\n")[0].splitlines()
    rows = {name: float(values[0]) for name, *values in map(split_cells, lines[1:])}
    assert len(slept) >= 2
    assert 3 * rows["whole step"] < 1000 * min(slept)  # three steps were traced, in milliseconds
    assert rows["language_model forward"] < 0.7 * rows["whole step"]


def split_cells(line: str) -> list[str]:
    return re.split(" {2,}", line.strip())


def test_a_run_leaves_a_trace_and_a_table(train: Callable[..., Path], tmp_path: Path):
    folder = train(
        "pretrain-smol", tmp_path / "run", *SHORT, *EVERYTHING, "trainer.max_steps=9", "trainer.profile=true"
    )
    trace = json.loads(gzip.decompress((folder / "profile" / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"visual_encoder", "connector", "language_model", "loss", "data wait"} <= names
    by_part, by_operator = (folder / "profile" / "table.txt").read_text().split("\n\n", 1)
    rows = {name: values for name, *values in map(split_cells, by_part.splitlines()[1:])}
    ways = [f"{part} {way}" for part in ("visual_encoder", "connector", "language_model", LOSS)
            for way in ("forward", "backward")]  # fmt: skip
    assert list(rows) == ["data wait", *ways, "optimiser", OTHER_ROW, "whole step"]
    assert all(float(row[0]) > 0 for row in rows.values())
    assert sum(float(row[1].rstrip("%")) for row in rows.values()) == pytest.approx(200, abs=1)
    assert "aten::" in by_operator


def test_what_is_frozen_has_no_time_backward(train: Callable[..., Path], tmp_path: Path):
    folder = train("pretrain-smol", tmp_path / "run", *SHORT, "trainer.max_steps=5", "trainer.profile=true")
    text = (folder / "profile" / "table.txt").read_text()
    assert "language_model backward" in text  # the connector's gradient comes through it
    assert "visual_encoder backward" not in text


def test_a_run_that_is_too_short_says_so(train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = train("pretrain-smol", tmp_path / "run", *SHORT, "trainer.max_steps=2", "trainer.profile=true")
    assert not (folder / "profile").exists()
    assert "the run had 2 steps, and the first 3 are left out" in caplog.text
