"""A run that is stopped anywhere and started again by the same command ends with the weights of one that was not.

Each case is stopped three times: between the checkpoint of an epoch's last step and the evaluation that follows it,
between two accumulated batches, and when training is over but `final` is not written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_parts import Parts
from vlm.train import run as run_module
from vlm.train.monitor.speed import METRIC_LABELS
from vlm.train.trainer import VLMTrainer

Train = Callable[..., Path]

DROPOUT = [
    "trainer.lora.language_model.r=2", "trainer.lora.dropout=0.3", "trainer.lora.language_model.alpha=8",
    "trainer.learning_rate.language_model_learning_rate=1e-2",
]  # fmt: skip
"""Adapters, whose dropout draws random numbers in every step."""

TWO_EPOCHS = [
    "trainer.num_train_epochs=2", "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2",
    "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.logging_steps=3", "trainer.num_samples=1",
    "inference.temperature=0.7", "trainer.save_total_limit=2",
]  # fmt: skip
"""Two epochs of three steps, a log after every third one, and sample answers that draw random numbers."""

EVALUATED = ["dataset.eval_split=0.25", "trainer.eval_strategy=epoch"]
PACKED = ["trainer.packing=true", "trainer.max_tokens_per_batch=256"]


def mixture(world: Path) -> list[str]:
    """Two sources, of which an epoch takes one and a half times 24 records."""
    sources = [("one", "1"), ("two", "0.5")]
    words = [(f"{name}.path={world / 'records.json'}", f"{name}.weight={weight}") for name, weight in sources]
    return ["dataset.path=null", *(f"dataset.sources.{word}" for pair in words for word in pair)]


CASES: dict[str, Callable[[Path, Parts], list[str]]] = {
    "packed mixture": lambda world, parts: [*DROPOUT, *EVALUATED, *PACKED, *mixture(world)],
    "best fit": lambda world, parts: [
        *DROPOUT, *EVALUATED, *PACKED, "trainer.packing_strategy=best_fit", "trainer.max_tokens_per_batch=128",
        "trainer.num_train_epochs=9",
    ],
    "groups, new tokens, workers": lambda world, parts: [
        *DROPOUT, *EVALUATED, "trainer.train_sampling_strategy=group_by_modality_length",
        'model.language_model.new_tokens=["<point>"]', "trainer.dataloader_num_workers=2",
    ],
    "cached features": lambda world, parts: [*DROPOUT, *EVALUATED, "dataset.cache_features=true"],
    "stream": lambda world, parts: [
        *DROPOUT, "dataset.streaming=true", "dataset.shuffle_buffer=5", "trainer.max_steps=6",
        f"dataset.eval_path={world / 'records.json'}", "trainer.eval_strategy=steps", "trainer.eval_steps=3",
    ],
    "batch norm of a frozen encoder": lambda world, parts: [
        *DROPOUT, *EVALUATED, f"model.visual_encoder.hf_name={parts.encoder('timm_convnet')}",
    ],
}  # fmt: skip
SLOW_CASES: dict[str, Callable[[Path, Parts], list[str]]] = {
    "persistent workers": lambda world, parts: [
        *DROPOUT, *EVALUATED, "trainer.dataloader_num_workers=2", "trainer.dataloader_persistent_workers=true",
    ],
    "best fit stream, workers": lambda world, parts: [
        *DROPOUT, *PACKED, "trainer.packing_strategy=best_fit", "dataset.streaming=true", "trainer.max_steps=6",
        "trainer.dataloader_num_workers=2",
    ],
    "packed stream": lambda world, parts: [*DROPOUT, *PACKED, "dataset.streaming=true", "trainer.max_steps=6"],
    "blocks": lambda world, parts: [
        *DROPOUT, *EVALUATED, "trainer.train_sampling_strategy=group_by_modality_blocks",
        "trainer.loss_average=micro_batch",
    ],
    "Muon": lambda world, parts: [*EVALUATED, "trainer.optim=muon"],
    "plateau": lambda world, parts: [
        *DROPOUT, *EVALUATED, "trainer.lr_scheduler_type=reduce_lr_on_plateau", "trainer.metric_for_best_model=loss",
    ],
    "saved at the end of epochs": lambda world, parts: [*DROPOUT, *EVALUATED, "trainer.save_strategy=epoch"],
}  # fmt: skip


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the next run be killed at a point: `after save`, `between batches` or `before final`; `never` ends that."""
    step, save, write = VLMTrainer.training_step, VLMTrainer._save_checkpoint, run_module.write_final
    begun: list[int] = []

    def die_between_batches(self: VLMTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        begun.append(self.state.global_step)
        if begun.count(4) == 2 or begun.count(5) == 1:  # the fifth step of some cases has a single batch
            raise Killed
        return step(self, *args, **kwargs)

    def die_after_save(self: VLMTrainer, *args: Any) -> None:
        save(self, *args)
        if self.state.global_step == 3:
            raise Killed

    def die(*args: Any) -> Path:
        raise Killed

    def at(point: str) -> None:
        begun.clear()
        monkeypatch.setattr(VLMTrainer, "training_step", die_between_batches if point == "between batches" else step)
        monkeypatch.setattr(VLMTrainer, "_save_checkpoint", die_after_save if point == "after save" else save)
        monkeypatch.setattr(run_module, "write_final", die if point == "before final" else write)

    return at


POINTS = ("after save", "between batches", "before final")


def run_disturbed(start: Callable[[], Path], kill: Callable[[str], None], points: tuple[str, ...] = POINTS) -> Path:
    """Start a run as often as it takes to its end, killed on the way."""
    for point in points:
        kill(point)
        with pytest.raises(Killed):
            start()
    kill("never")
    return start()


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)], ids=lambda case: case
)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(
    case: str, train: Train, world: Path, parts: Parts, tmp_path: Path, kill: Callable[[str], None]
):
    words = [*TWO_EPOCHS, *(CASES | SLOW_CASES)[case](world, parts), f"dataset.cache_dir={tmp_path / 'cache'}"]
    whole = train("pretrain-smol", tmp_path / "whole", *words)
    stopped = run_disturbed(lambda: train("pretrain-smol", tmp_path / "stopped", *words), kill)
    assert_same_run(stopped, whole)


HEADS = {
    "folds": ["dataset.folds=2", "dataset.eval_split=null", "model.head.options.dropout=0.3"],
    "moving body": [
        "trainer.unfreeze.train_connector=true", "trainer.learning_rate.connector_learning_rate=1e-2",
        "model.head.options.dropout=0.3", "trainer.eval_strategy=epoch",
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_is_stopped_ends_as_one_that_is_not(
    case: str, train_head: Train, tmp_path: Path, kill: Callable[[str], None]
):
    words = [*TWO_EPOCHS, "trainer.per_device_train_batch_size=6", *HEADS[case]]
    points = POINTS if case != "folds" else ("before final",)  # folds are trainers of their own
    whole = train_head("head-binary", "bright", tmp_path / "whole", *words)
    stopped = run_disturbed(lambda: train_head("head-binary", "bright", tmp_path / "run", *words), kill, points)
    assert_same_run(stopped, whole)
    assert (stopped / "scores.json").read_text() == (whole / "scores.json").read_text()


def assert_same_run(run: Path, other: Path) -> None:
    """Compare the weights of two runs to the bit, and all that they logged but times."""
    for file in sorted((other / "final").glob("*.safetensors")):
        expected, found = load_file(file), load_file(run / "final" / file.name)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert read_log(run) == read_log(other)
    for name in ("samples.md", "skipped.jsonl", "data.json"):
        assert ((run / name).exists(), (other / name).exists()) in ((True, True), (False, False))
        if (run / name).exists():
            assert (run / name).read_text() == (other / name).read_text(), name


def read_log(run: Path) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = (*METRIC_LABELS, "train_runtime", "eval_runtime")
    return [
        {key: value for key, value in line.items() if key not in timed and not key.endswith("_per_second")}
        for line in lines
    ]


def test_evaluating_more_often_changes_no_weight(train: Train, tmp_path: Path):
    words = [*TWO_EPOCHS, *DROPOUT, "dataset.eval_split=0.25"]
    seldom = train("pretrain-smol", tmp_path / "seldom", *words, "trainer.eval_strategy=epoch")
    often = ["trainer.eval_strategy=steps", "trainer.eval_steps=1"]
    other = train("pretrain-smol", tmp_path / "often", *words, *often)
    for file in (seldom / "final").glob("*.safetensors"):
        expected, found = load_file(file), load_file(other / "final" / file.name)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
