"""What a sweep ends with; `cli/test_sweep.py` runs one."""

import logging
from pathlib import Path

import pytest

from tests.runs.directories import logged, write_run
from tests.runs.test_report import check_page
from vlm.runs import sweep
from vlm.runs.sweep import finish_sweep, write_sweep

RATE = "trainer.learning_rate.connector_learning_rate"


def test_a_sweep_ends_in_a_table_a_plot_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for rate, losses in {1e-3: (1.0, 1.1), 1e-2: (2.0, 2.1)}.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path / f"{rate}-{seed}", logged([3.0, loss]), settings={RATE: rate, "trainer.seed": seed})
    write_run(tmp_path / "refused", settings={RATE: 0.5, "trainer.seed": 0}, is_done=False)
    finish_sweep(tmp_path)
    header, *rows, _, verdict, _, page = capsys.readouterr().out.strip().splitlines()
    assert header.split()[:4] == ["connector_learning_rate", "eval_loss", "±", "seeds"]
    assert [row.split()[0] for row in rows] == ["0.001", "0.01", "0.5"]
    assert "more than noise" in verdict
    assert page == f"Page: {tmp_path / 'sweep.html'}"
    check_page((tmp_path / "sweep.html").read_text())
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_settings_that_are_no_numbers_are_plotted_too(tmp_path: Path):
    for name in ("mlp", "linear"):
        write_run(tmp_path / name, logged([3.0]), settings={"model/connector": name, "dataset.path": name})
    summary = write_sweep(tmp_path)
    assert summary is not None
    assert (tmp_path / "sweep.png").is_file()
    assert summary.header()[:2] == ["connector", "dataset.path"]


def test_a_sweep_that_varies_nothing_says_so(tmp_path: Path):
    write_run(tmp_path / "only", logged([3.0, 1.0]))
    summary = write_sweep(tmp_path)
    assert summary is not None
    assert "all runs" not in str(summary)
    assert summary.verdict == (
        "There is one run to compare: eval_loss is 1.1. To vary a setting, give it several values, separated by "
        "commas: trainer.learning_rate.connector_learning_rate=1e-4,1e-3."
    )
    write_run(tmp_path / "empty", is_done=False)
    assert write_sweep(tmp_path).verdict.startswith("Nothing was varied but the seed in 2 runs")  # pyright: ignore


def test_a_sweep_without_runs_says_nothing(tmp_path: Path):
    assert write_sweep(tmp_path) is None


def test_a_failure_is_logged_and_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sweep, "write_sweep", lambda folder: 1 / 0)
    with caplog.at_level(logging.ERROR):
        finish_sweep(tmp_path)
    assert "could not be written" in caplog.text
