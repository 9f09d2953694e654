"""Which evaluation is the best so far."""

import math
from pathlib import Path
from typing import Any

import pytest

from vlm.config.schema import RunConfig
from vlm.train.checkpoints.best import BestModel


def make(metric: str, **settings: object) -> BestModel:
    options: Any = RunConfig().trainer
    options.keep_best, options.greater_is_better = metric, settings.get("greater")
    best = BestModel.of_run(options, settings.get("known"), is_writer=True)  # pyright: ignore[reportArgumentType]
    assert best is not None
    return best


@pytest.mark.parametrize(
    ("metric", "greater", "values", "bests"),
    [
        ("eval_loss", None, [3.0, 2.0, 2.5, math.nan, 1.0], [1, 2, 5]),
        ("loss", None, [3.0, 3.0, 2.9], [1, 3]),
        ("eval_head_mae", None, [3.0, 4.0], [1]),
        ("exact_match", None, [0.1, 0.3, 0.2, math.inf], [1, 2, 4]),
        ("eval_regret", False, [2.0, 3.0, 1.0], [1, 3]),
        ("eval_blank_loss", True, [2.0, 3.0, 1.0], [1, 2]),
    ],
)
def test_lower_losses_and_higher_scores_are_better(
    metric: str, greater: bool | None, values: list[float], bests: list[int]
):
    best = make(metric, greater=greater)
    found = [step for step, value in enumerate(values, 1) if best.update({best.name: value}, step)]
    assert found == bests
    assert best.is_new(bests[-1])
    assert not best.is_new(bests[-1] + 1)


def test_a_metric_that_nobody_measures_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.keep_best=eval_los: no evaluation measures it; allowed are eval_"):
        make("los").update({"eval_loss": 1.0, "eval_runtime": 2.0}, 1)


def test_a_metric_that_is_undefined_at_times_is_passed_over():
    best = make("auroc", known=frozenset({"auroc"}))
    assert not best.update({"eval_loss": 1.0}, 1)
    assert best.update({"eval_auroc": 0.5}, 2)


def test_the_one_before_is_the_best_again_where_its_model_could_not_be_saved():
    best = make("loss")
    best.update({"eval_loss": 2.0}, 1)
    best.update({"eval_loss": 1.0}, 2)
    best.revert()
    assert best.is_new(1)
    assert best.update({"eval_loss": 1.5}, 3)


def test_it_is_kept_with_checkpoints(tmp_path: Path):
    best, again, other = make("loss"), make("eval_loss"), make("accuracy")
    best.update({"eval_loss": 0.1 + 0.2}, 7)
    best.save_to(tmp_path)
    for model in (again, other):
        model.load_from(tmp_path)
    assert again.best == best.best
    assert other.best is None
    again.load_from(tmp_path / "nowhere")
    assert again.best == best.best


def test_nothing_is_kept_where_nothing_is_asked_for():
    assert BestModel.of_run(RunConfig().trainer, None, is_writer=True) is None
