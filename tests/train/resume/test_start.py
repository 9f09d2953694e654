"""One command starts a run, goes on with it, and leaves it alone once it is done."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import losses

SHORT = (
    "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.num_samples=0",
    "trainer.save_total_limit=9",
)  # fmt: skip

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that nothing disturbed."""
    return train("pretrain-smol", tmp_path_factory.mktemp("runs") / "whole", *SHORT)


@pytest.fixture
def done(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def stopped(done: Path) -> Path:
    """A copy of it as it was after its first checkpoint."""
    rewind(done, 2)
    return done


def rewind(folder: Path, step: int) -> None:
    """Remove what a run wrote after a checkpoint."""
    shutil.rmtree(folder / "final", ignore_errors=True)
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same_weights(run: Path, other: Path) -> None:
    expected, found = weights(other), weights(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_same_command_goes_on(whole: Path, stopped: Path, train: Train):
    train("pretrain-smol", stopped, *SHORT)
    assert_same_weights(stopped, whole)
    assert losses(stopped) == losses(whole)


def test_a_run_that_is_done_stays_as_it_is(done: Path, train: Train, caplog: pytest.LogCaptureFixture):
    before = snapshot(done)
    with caplog.at_level(logging.INFO, logger="vlm.train.resume.directory"):
        train("pretrain-smol", done, *SHORT)
        train("pretrain-smol", done, *SHORT, "trainer.resume_from_checkpoint=true", "trainer.save_steps=1")
    assert snapshot(done) == before
    assert f"The run in {done} is done after 4 steps: nothing is left to do" in caplog.text
