"""Ranks that learn preferences, or from a teacher, are ended by `kill -9` and started again by the same command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import run_ranks
from tests.train.distillation.distillation_runs import KEY, STUDENT, save_narrow, train_teacher
from tests.train.objectives.preference_runs import WORDS, write_preferences
from tests.train.resume.test_exactness import assert_same_run

KILLED = "tests.train.resume.killed"
SAVED = [
    "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.max_steps=4", "trainer.logging_steps=1",
    "trainer.per_device_train_batch_size=2",
]  # fmt: skip

Train = Callable[..., Path]


def assert_killed_runs_end_as_one(command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill rank 1 in a save and in a step, and rank 0 before `final`; compare with a run that was left alone."""
    for kill in ("save:1@1", "step:3@1", "final@0"):
        monkeypatch.setenv("KILL", kill)
        ranks = run_ranks(KILLED, [*command, f"trainer.output_dir={folder / 'run'}"])
        assert any(ended.returncode == -9 for ended in ranks)
    monkeypatch.delenv("KILL")
    for name in ("run", "whole"):
        for ended in run_ranks(KILLED, [*command, f"trainer.output_dir={folder / name}"]):
            assert ended.returncode == 0, ended.stderr[-2000:]
    assert_same_run(folder / "run", folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_killed_preference_runs_end_as_one_that_was_left_alone(
    common: list[str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    """Packed, with adapters under ZeRO-2 and whole parts under ZeRO-3; the reference is kept on disk."""
    whole = ["trainer/lora=none", "trainer.unfreeze.train_language_model=true"] if stage == "zero3" else []
    command = [
        "-cn", "preference-smol", *common, *write_preferences(world, tmp_path / "pairs.json"), *WORDS, *whole, *SAVED,
        f"trainer/deepspeed={stage}", "trainer.preference.reference=cached", f"dataset.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    assert_killed_runs_end_as_one(command, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_killed_distillation_runs_end_as_one_that_was_left_alone(
    train: Train, common: list[str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    command = [
        "-cn", "distil-smol", *common, *STUDENT, *SAVED, f"{KEY}.teacher={train_teacher(train, tmp_path / 'teacher')}",
        f"model.language_model.hf_name={save_narrow(world, tmp_path / 'narrow')}", f"trainer/deepspeed={stage}",
    ]  # fmt: skip
    assert_killed_runs_end_as_one(command, tmp_path, monkeypatch)
