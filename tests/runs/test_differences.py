"""What differs between runs."""

from collections.abc import Mapping
from pathlib import Path

from tests.runs.directories import write_run
from vlm.runs.differences import differing_settings, unusual_settings, varied_settings
from vlm.runs.read import RunDirectory


def make_runs(folder: Path, *settings: Mapping[str, object]) -> list[RunDirectory]:
    """Runs with these settings, in numbered folders."""
    return [RunDirectory(write_run(folder / str(at), settings=one)) for at, one in enumerate(settings)]


def test_settings_differ_by_value_and_places_do_not_count(tmp_path: Path):
    runs = make_runs(
        tmp_path, {"trainer.seed": 1, "trainer.output_dir": "a"}, {"trainer.seed": 1.0, "dataset.path": "b"}
    )
    assert differing_settings(runs) == {"dataset.path": ["train.json", "b"]}


def test_what_commands_set_is_named_and_not_what_follows_from_it(tmp_path: Path):
    runs = make_runs(tmp_path, {"model/connector": "mlp"}, {"model/connector": "linear", "trainer.seed": 1})
    assert varied_settings(runs).keys() == {"model/connector", "trainer.seed"}
    for run in runs:
        (run.path / "command.txt").write_text("python -m vlm -cn my-run\n")
    assert varied_settings(list(map(RunDirectory, (run.path for run in runs)))) != {}


def test_a_list_names_what_most_runs_do_not_have(tmp_path: Path):
    common = {"trainer.max_steps": 5, "trainer.seed": 1}
    runs = make_runs(tmp_path, common, common, common, {**common, "trainer.seed": 2})
    assert unusual_settings(runs) == [{}, {}, {}, {"trainer.seed": 2}]
    assert unusual_settings(runs[2:]) == [{"trainer.seed": 1}, {"trainer.seed": 2}]


def test_a_list_names_a_group_and_not_the_settings_that_follow_from_it(tmp_path: Path):
    rate, other = "trainer.learning_rate.connector_learning_rate", "trainer.learning_rate.language_model_learning_rate"
    runs = make_runs(tmp_path, {rate: 1e-3}, {"trainer/learning_rate": "pretrain", other: 2e-5}, {rate: 5e-4})
    assert [run.settings[rate] for run in runs] == [1e-3, 1e-3, 5e-4]
    (runs[1].path / "config.yaml").write_text(
        "trainer: {learning_rate: {connector_learning_rate: 1.0e-4, language_model_learning_rate: 2.0e-5}}\n"
    )
    assert unusual_settings([RunDirectory(run.path) for run in runs]) == [
        {rate: 1e-3}, {"trainer/learning_rate": "pretrain", other: 2e-5}, {rate: 5e-4}
    ]  # fmt: skip


def test_settings_of_a_whole_model_follow_from_its_choice(tmp_path: Path):
    size = "model.language_model.hf_name"
    runs = make_runs(tmp_path, {size: "a"}, {"model": "b"}, {size: "c"})
    (runs[1].path / "config.yaml").write_text("model: {language_model: {hf_name: d}}\n")
    assert unusual_settings([RunDirectory(run.path) for run in runs]) == [{size: "a"}, {"model": "b"}, {size: "c"}]
