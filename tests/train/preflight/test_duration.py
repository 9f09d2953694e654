"""The time of a run grows with its operations or tokens; evaluations and checkpoints are those of the run."""

from dataclasses import replace
from math import hypot
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fixtures import compose_config
from vlm.data.batching.stats import BatchStats
from vlm.train.preflight.duration import disk_speed, number_of_times, predict_time
from vlm.train.preflight.findings import DiskFindings, TimeFindings
from vlm.train.preflight.probe import Probe
from vlm.train.preflight.step_time import DRIFT


@pytest.mark.parametrize(
    ("strategy", "every", "number"), [("no", 5, 0), ("epoch", None, 3), ("steps", 25, 4), ("steps", 0.1, 10)]
)
def test_evaluations_are_counted(strategy: str, every: float | None, number: int):
    args: Any = SimpleNamespace(num_train_epochs=3)
    assert number_of_times(strategy, every, 100, args) == number


def test_without_known_lengths_each_step_is_as_the_probed_ones():
    args: Any = SimpleNamespace(
        num_train_epochs=1,
        max_steps=-1,
        world_size=1,
        eval_on_start=False,
        eval_strategy="no",
        eval_steps=None,
        save_strategy="no",
        save_steps=1,
    )
    config = compose_config("pretrain-smol", ["dataset.path=x"])
    probe = Probe(seconds=[2.0, 4.0], stats=[(BatchStats(), 0, 0, 1)] * 2, max_steps=10, batch_samples=4)
    found = predict_time(probe, config, args, object(), None, DiskFindings(0, 0, 0, 1))
    assert found is not None
    assert (found.steps, found.step, found.training, found.evaluation, found.saving) == (10, 3.0, 30.0, 0, 0)
    assert found.margin == pytest.approx(hypot(6.31 * 2**0.5 * (1 / 2 + 1 / 10) ** 0.5, DRIFT * 3.0))
    assert predict_time(Probe(), config, args, object(), None, DiskFindings(0, 0, 0, 1)) is None


def test_the_interval_of_the_whole_allows_for_what_is_no_step():
    found = TimeFindings(
        steps=10, step=2.0, margin=0.5, timed=4, basis="its tokens", computing=None, loading=7.0, evaluation=20.0,
        evaluations=2, answering=10.0, answers=8, saving=6.0, checkpoints=1, drawing=4.0,
    )  # fmt: skip
    assert (found.total, found.total_margin) == (67.0, pytest.approx(5.0 + DRIFT * 40.0))
    assert replace(found, margin=None).total_margin is None


def test_the_speed_of_a_disk_leaves_nothing_there(tmp_path: Path):
    assert disk_speed(tmp_path / "new") > 0
    assert list(tmp_path.iterdir()) == []
