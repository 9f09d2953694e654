"""Processes that `kill -9` ends, started again by the same command, end with the weights of one that was left alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.forked import run_forked, run_ranks
from tests.train.resume.test_exactness import DROPOUT, EVALUATED, PACKED, TWO_EPOCHS, assert_same_run

KILLED = "tests.train.resume.killed"

Train = Callable[..., Path]


def command(common: list[str], folder: Path, *words: str) -> list[str]:
    return ["-cn", "pretrain-smol", *common, *TWO_EPOCHS, *words, f"trainer.output_dir={folder}"]


def test_a_process_that_is_killed_is_started_again_by_the_same_command(common: list[str], tmp_path: Path):
    """In the first save, in a step, before `final`; the whole run is a process too, with a hash seed of its own."""
    words = [*DROPOUT, *EVALUATED, "trainer.dataloader_num_workers=2"]
    kills = ["save:1", "step:4", "final"]
    for kill in kills:
        (ended,) = run_forked(["-m", KILLED, *command(common, tmp_path / "run", *words)], environments=[{"KILL": kill}])
        assert ended.returncode == -9, ended.stderr[-2000:]
    for name in ("run", "whole"):
        (ended,) = run_forked(["-m", KILLED, *command(common, tmp_path / name, *words)])
        assert ended.returncode == 0, ended.stderr[-2000:]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert len((tmp_path / "run" / "command.txt").read_text().splitlines()) == 3  # the first one saved nothing
    assert not list((tmp_path / "run").glob("run.lock*"))


def test_the_same_command_twice_gives_the_same_bits(common: list[str], tmp_path: Path):
    words = [*DROPOUT, *PACKED, "trainer.full_determinism=true", "trainer.num_train_epochs=1"]
    folders = tmp_path / "one", tmp_path / "two"
    commands = [["-m", "vlm", *command(common, folder, *words)] for folder in folders]
    for ended in run_forked(*commands, environments=[{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"}]):
        assert ended.returncode == 0, ended.stderr[-2000:]
    assert_same_run(*folders)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("none", [*PACKED]),
        ("zero0", []),
        ("zero2", [*PACKED]),
        ("zero3", [*PACKED, "trainer.packing_strategy=best_fit", "trainer.num_train_epochs=9"]),
    ],
)
def test_ranks_that_are_killed_are_started_again_by_the_same_command(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, words: list[str]
):
    words = [*DROPOUT, *EVALUATED, *words, f"trainer/deepspeed={stage}", "trainer.per_device_train_batch_size=2"]
    for kill in ("save:1@1", "step:4@1", "final@0"):
        monkeypatch.setenv("KILL", kill)
        assert any(ended.returncode == -9 for ended in run_ranks(KILLED, command(common, tmp_path / "run", *words)))
    monkeypatch.delenv("KILL")
    for name in ("run", "whole"):
        for ended in run_ranks(KILLED, command(common, tmp_path / name, *words)):
            assert ended.returncode == 0, ended.stderr[-2000:]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_an_accepted_learning_rate_is_that_of_all_ranks(common: list[str], tmp_path: Path, stage: str):
    words = [*EVALUATED, f"trainer/deepspeed={stage}", "trainer.per_device_train_batch_size=2"]
    words = command(common, tmp_path / "run", *words, "trainer.save_total_limit=9", "trainer.logging_steps=1")
    for ended in run_ranks("vlm", words):
        assert ended.returncode == 0, ended.stderr[-2000:]
    before = load_file(tmp_path / "run" / "final" / "model.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("checkpoint-5", "checkpoint-6", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    words += ["trainer.learning_rate.connector_learning_rate=0.5", "trainer.resume_changes=accept"]
    for ended in run_ranks("vlm", words):
        assert ended.returncode == 0, ended.stderr[-2000:]
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved > 0.01
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates, new = ([line["learning_rate/connector"] for line in log if "loss" in line] for log in (lines, again))
    assert new[:4] == rates[:4]
    assert new[4] == pytest.approx(500 * rates[4])


TELLING = """
import os, sys
from pathlib import Path
from vlm.cli.main import main

try:
    main(sys.argv[1:])
except SystemExit as end:
    Path(os.environ["TOLD"]).write_text(str(end.code))
"""
"""The command, which ends well and leaves in a file what it was refused for."""


def test_two_copies_of_one_run_at_once(common: list[str], tmp_path: Path):
    """As two tasks of a cluster without a launcher: one trains, the other is refused, or finds the run done."""
    words = ["-c", TELLING, *command(common, tmp_path / "run", "trainer.num_train_epochs=1")]
    told = [tmp_path / "one", tmp_path / "two"]
    for ended in run_forked(words, words, environments=[{"TOLD": str(file)} for file in told]):
        assert ended.returncode == 0, ended.stderr[-2000:]
    for file in filter(Path.exists, told):
        assert "another run is training in it" in file.read_text()
        assert "need a launcher (torchrun, deepspeed)" in file.read_text()
    assert not all(map(Path.exists, told))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3]
    assert (tmp_path / "run" / "final" / "run.json").is_file()
