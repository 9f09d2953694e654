"""Which setting is best, and whether that is more than noise."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_ind

from tests.runs.directories import write_records, write_run
from vlm.runs.outcome import describe_verdict, group_by_setting, metric_of, outcome_of, rank, sign_of
from vlm.runs.read import RunDirectory


def make_runs(
    folder: Path, values: dict[float, Sequence[float]], *, width: float | None = None, name: str = "eval_loss"
) -> list[RunDirectory]:
    """Runs of several seeds: a setting's learning rate -> the loss of each seed."""
    key, runs = "trainer.learning_rate.connector_learning_rate", []
    for rate, losses in values.items():
        for seed, loss in enumerate(losses):
            line = {"step": 1, name: loss} | ({} if width is None else {f"{name}_ci95": width})
            path = folder / f"{rate}-{seed}"
            runs.append(RunDirectory(write_run(path, [line], settings={key: rate, "trainer.seed": seed})))
    return runs


def verdict(runs: list[RunDirectory], *, in_sweep: bool = False) -> str:
    """The sentence about runs."""
    metric = metric_of(runs)
    return describe_verdict(group_by_setting(runs, metric), metric, sign_of(metric, runs), in_sweep=in_sweep)


def test_the_spread_between_seeds_is_the_noise_of_a_t_test(tmp_path: Path):
    first, second = [1.0, 1.2, 1.1], [1.3, 1.25, 1.5]
    best, (gap,) = rank(group_by_setting(make_runs(tmp_path, {1e-3: first, 1e-4: second}), "eval_loss"), -1)
    interval = ttest_ind(first, second).confidence_interval()
    assert best is not None
    assert best.values == {"trainer.learning_rate.connector_learning_rate": 1e-3}
    assert gap.half_width is not None
    assert np.allclose([gap.difference - gap.half_width, gap.difference + gap.half_width], interval)


@pytest.mark.parametrize(
    ("values", "width", "said"),
    [
        ({1e-3: [1.0, 1.01], 1e-4: [2.0, 2.02]}, None, "by the spread between seeds: that is more than noise"),
        ({1e-3: [1.0, 1.5], 1e-4: [1.2, 1.6]}, None, "by the spread between seeds: that is within noise"),
        (
            {1e-3: [1.0], 1e-4: [1.2]},
            0.1,
            "by the evaluation's intervals, taken for independent: that is more than noise",
        ),
        ({1e-3: [1.0], 1e-4: [1.1]}, 0.1, "that is within noise"),
        ({1e-3: [1.0], 1e-4: [2.0]}, None, "one seed of each: train each with several values of trainer.seed."),
    ],
)
def test_a_verdict_says_what_it_knows_of_noise(
    tmp_path: Path, values: dict[float, list[float]], width: float | None, said: str
):
    text = verdict(make_runs(tmp_path, values, width=width))
    assert said in text
    assert text.startswith("Best by eval_loss (lowest): ")


def test_runs_that_differ_in_nothing_but_the_seed_are_not_ranked(tmp_path: Path):
    text = verdict(make_runs(tmp_path, {1e-3: [1.0, 1.1]}))
    assert text.startswith("Nothing was varied but the seed in 2 runs: eval_loss is 1.05 ± 0.071 over 2 seeds. ")
    assert text.endswith("such as trainer.learning_rate.connector_learning_rate=1e-4.")


def test_what_is_advised_fits_the_case(tmp_path: Path):
    evaluated, trained = (make_runs(tmp_path / name, {1e-3: [1.0], 1e-4: [2.0]}, name=name)
                          for name in ("eval_loss", "loss"))  # fmt: skip
    assert verdict(evaluated, in_sweep=True).endswith("add trainer.seed=1,2,3 to the sweep.")
    assert "evaluate (dataset.eval_split=0.05 trainer.eval_strategy=epoch), or train each" in verdict(trained)


def test_the_same_records_tell_smaller_differences(tmp_path: Path):
    """Two runs whose losses differ a little on each of many records, which differ much from each other."""
    runs = make_runs(tmp_path, {1e-3: [1.0], 1e-4: [1.1]}, width=0.5)
    hardness = np.linspace(0.1, 1.9, 40)
    for run, sums in zip(runs, (hardness, hardness + np.tile([0.05, 0.15], 20)), strict=True):
        write_records(run.path, 1, {"loss": (sums, np.ones(40))})
    assert "by the evaluation's records, which are the same: that is more than noise. Each has one seed" in verdict(
        runs
    )
    write_records(runs[1].path, 1, {"loss": (hardness + 0.1, np.ones(40))}, records="others")
    assert "taken for independent: that is within noise" in verdict([RunDirectory(run.path) for run in runs])


def test_runs_without_an_outcome_are_no_best(tmp_path: Path):
    assert verdict([RunDirectory(write_run(tmp_path / "a"))]) == "No run has a value of loss, so none is best."


def test_false_alarms_are_as_rare_as_the_interval_says(tmp_path: Path):
    random = np.random.default_rng(0)
    runs = make_runs(tmp_path, {1e-3: [0.0] * 3, 1e-4: [0.0] * 3})
    settings = group_by_setting(runs, "eval_loss")
    alarms = 0
    for _ in range(400):
        for setting in settings:
            setting.outcomes = [type(one)(random.normal(), 1) for one in setting.outcomes]
        alarms += rank(settings, -1)[1][0].is_clear is True
    assert 5 <= alarms <= 40  # 20 of 400 are expected


def test_the_metric_of_keep_best_decides_with_its_best_evaluation(tmp_path: Path):
    lines = [{"step": at, "eval_exact_match": value, "eval_loss": 1.0} for at, value in ((1, 0.2), (2, 0.9), (3, 0.5))]
    run = RunDirectory(write_run(tmp_path / "a", lines, settings={"trainer.keep_best": "exact_match"}))
    metric = metric_of([run])
    outcome = outcome_of(run, metric)
    assert (metric, sign_of(metric), outcome and (outcome.value, outcome.step)) == ("eval_exact_match", 1, (0.9, 2))
    assert outcome_of(run, "eval_loss") == outcome_of(run, "eval_loss")


@pytest.mark.parametrize("metric", ["eval_loss", "eval_loss/my_photos", "chair_i", "blank_chair_s", "head_mae"])
def test_less_is_better_of_losses_and_of_objects_that_are_not_there(metric: str):
    assert sign_of(metric) == -1


@pytest.mark.parametrize("metric", ["eval_exact_match", "chair_recall", "accuracy"])
def test_more_is_better_of_right_answers(metric: str):
    assert sign_of(metric) == 1
