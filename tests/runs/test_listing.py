"""Lists of runs: columns, conditions and order."""

import json
from pathlib import Path

import pytest

from tests.runs.directories import logged, write_run
from vlm.cli import runs as cli
from vlm.runs.listing import Filter, RunTable, format_duration, format_number
from vlm.runs.read import find_runs


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, of which one has not logged anything."""
    folder = tmp_path_factory.mktemp("outputs")
    write_run(folder / "low", logged([3.0, 1.0]), settings={"trainer.seed": 1, "dataset.format": "a"})
    write_run(folder / "high", logged([3.0, 2.0]), settings={"trainer.seed": 2, "dataset.format": "a"})
    write_run(folder / "empty", settings={"trainer.seed": 3, "model.format": "b"}, is_done=False)
    return folder


def names(outputs: Path, *filters: str, sort: str | None = "name", reverse: bool = False) -> list[str]:
    """The names of the runs that a command line selects."""
    table = RunTable(find_runs(outputs))
    return [run.name for run in table.select([Filter.parse(text) for text in filters], sort, reverse=reverse)]


def test_conditions_compare_metrics_settings_and_fields(outputs: Path):
    assert names(outputs, "eval_loss<1.2") == ["low"]
    assert names(outputs, "loss >= 1", "seed!=1") == ["high"]
    assert names(outputs, "state=done", "trainer.seed>1") == ["high"]
    assert names(outputs, "eval_loss!=1") == ["empty", "high", "low"]
    assert names(outputs, "state<3") == []


def test_metrics_are_shown_with_their_own_intervals(outputs: Path):
    table = RunTable(find_runs(outputs))
    (low,) = table.select([Filter.parse("name=low")], None)
    assert [table.text(low, key) for key in ("loss", "eval_loss", "image_gain")] == ["1", "1.1", "0.5 ± 0.2"]


def test_runs_without_a_value_come_last_in_either_order(outputs: Path):
    assert names(outputs, sort="eval_loss") == ["low", "high", "empty"]
    assert names(outputs, sort="image_gain", reverse=True)[-1] == "empty"
    assert names(outputs, sort="seed", reverse=True) == ["empty", "high", "low"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filter", "eval_loss"], "write a key, one of"),
        (["--sort", "evalloss"], "similar: eval_loss"),
        (["--columns", "format"], "several settings end with it"),
        (["--columns", "name,sed"], "seed"),
    ],
)
def test_what_cannot_be_meant_is_refused(outputs: Path, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        cli.main([str(outputs), *words])


def test_the_command_prints_a_table_and_json(outputs: Path, capsys: pytest.CaptureFixture[str]):
    cli.main([str(outputs), "--sort", "eval_loss"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "state", "step", "loss", "eval", "tokens/s", "duration", "differs"]
    assert rows[0].split()[:7] == ["low", "done", "20", "1", "1.1", "1,000", "0"]
    cli.main([str(outputs), "--json", "--columns", "name,eval_loss", "--filter", "state=done", "--sort", "name"])
    assert json.loads(capsys.readouterr().out) == [
        {"name": "high", "eval_loss": 2.1}, {"name": "low", "eval_loss": 1.1}
    ]  # fmt: skip


def test_the_speed_of_a_finished_run_is_that_of_the_whole_run(tmp_path: Path):
    write_run(tmp_path / "run", logged([3.0, 1.0]))
    (run,) = find_runs(tmp_path)
    assert run.tokens_per_second == 1000
    (tmp_path / "run" / "speed.json").write_text(json.dumps({"tokens_per_second": 640.0}))
    (run,) = find_runs(tmp_path)
    assert RunTable([run]).text(run, "tokens_per_second") == "640"


def test_a_refused_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", is_done=False)
    status = {"state": "refused", "message": "train.json: none of its 3 records can be used"}
    (run / "status.json").write_text(json.dumps(status))
    cli.main([str(tmp_path)])
    table, reason = capsys.readouterr().out.split("\n\n")
    assert table.splitlines()[1].split()[:2] == ["run", "refused"]
    assert reason == "run was refused: train.json: none of its 3 records can be used\n"
    cli.main([str(tmp_path), "--columns", "name,message"])
    assert capsys.readouterr().out.count("none of its 3 records") == 1


def test_folders_without_runs_say_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no runs in it"):
        cli.main([str(tmp_path)])
    with pytest.raises(ValueError, match="no such folder"):
        cli.main([str(tmp_path / "nothing")])


def test_a_narrow_terminal_cuts_the_longest_column(outputs: Path):
    table = RunTable(find_runs(outputs))
    widest = max(map(len, table.format(table.runs, ["name", "path"], 50).splitlines()))
    assert widest <= 50


def test_numbers_and_durations_are_short():
    assert [format_number(value) for value in (0.123456, 3.0, 12345.6)] == ["0.1235", "3", "12,346"]
    assert [format_duration(value) for value in (12, 320, 3600, 97200)] == ["12 s", "5 min 20 s", "1 h", "1 d 3 h"]
