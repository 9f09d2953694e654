"""The time of answers to samples and of plots: how many there are, and what a probe measures."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fixtures import compose_config
from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset
from vlm.train.preflight import answering
from vlm.train.preflight.answering import measures_answers, num_answers, time_answer, time_drawing
from vlm.train.preflight.duration import evaluates_last
from vlm.train.preflight.inspect import inspect_run


class Records(SampleDataset):
    """Ten records."""

    def __init__(self):
        pass

    def __len__(self) -> int:
        return 10


def configured(*words: str) -> RunConfig:
    """A run's configuration."""
    return compose_config("finetune-smol", ["dataset.path=x", "trainer.starts_from=null", *words])


def test_samples_are_answered_at_evaluations_and_at_the_end_once():
    config = configured("trainer.num_samples=3")
    assert num_answers(config, None, 0, ends_with_one=False) == 3
    assert num_answers(config, Records(), 2, ends_with_one=True) == 6
    assert num_answers(config, Records(), 2, ends_with_one=False) == 9


def test_metrics_are_of_as_many_answers_as_there_are_records():
    config = configured("trainer.num_samples=0", "trainer.eval_metrics=[exact_match]", "trainer.eval_metrics_samples=8")
    assert num_answers(config, Records(), 2, ends_with_one=False) == 16
    config.trainer.eval_metrics_samples = 64
    assert num_answers(config, Records(), 2, ends_with_one=True) == 20
    assert num_answers(config, None, 0, ends_with_one=False) == 0


@pytest.mark.parametrize(("names", "answers"), [("[]", False), ("[retrieval]", False), ("[retrieval,bleu]", True)])
def test_metrics_of_losses_need_no_answers(names: str, answers: bool):
    assert measures_answers(configured(f"trainer.eval_metrics={names}")) is answers


@pytest.mark.parametrize(
    ("strategy", "every", "last"), [("no", 5, False), ("epoch", None, True), ("steps", 50, True), ("steps", 0.3, False)]
)
def test_a_run_may_end_with_an_evaluation(strategy: str, every: float | None, last: bool):
    args: Any = SimpleNamespace(eval_strategy=strategy, eval_steps=every, num_train_epochs=1)
    assert evaluates_last(args, 100) is last


def test_a_run_without_answers_times_none():
    run: Any = None
    assert time_answer(run, run, configured("trainer.num_samples=0")) == 0.0


def test_plots_are_drawn_in_the_folder(tmp_path: Path):
    assert time_drawing(tmp_path) > 0
    assert {file.name for file in tmp_path.iterdir()} == {"loss.png", "speed.png"}


def test_answers_that_take_long_are_cut_off_and_extrapolated(common: list[str], monkeypatch: pytest.MonkeyPatch):
    words = [*common, "trainer.num_samples=2", "trainer.eval_strategy=no", "inference.max_new_tokens=40"]
    config = compose_config("finetune-smol", words)
    asked: list[dict[str, object]] = []

    def generate(*given: object, **options: object) -> list[list[int]]:
        """Five tokens of forty, and the time is up."""
        asked.append(options)
        return [[1, 2, 3, 4, 5], [1, 2]]

    monkeypatch.setattr(answering, "generate_answers", generate)
    monkeypatch.setattr(answering, "ANSWERING_SECONDS", 0.0)
    clock = iter((100.0, 103.0))
    monkeypatch.setattr(answering, "time", SimpleNamespace(perf_counter=lambda: next(clock, 103.0)))
    duration = inspect_run(config, "finetune-smol").duration
    assert asked == [{"max_time": 0.0}]
    assert duration is not None
    assert duration.answers == 2
    assert duration.answering == pytest.approx(3.0 * 40 / 5)
