"""Logs as columns."""

import json
from pathlib import Path

from tests.runs.directories import logged
from vlm.runs.files import Folder
from vlm.runs.metrics import Metrics, read_last_metrics


def test_metrics_are_columns_and_undefined_values_are_counted():
    metrics = Metrics([{"step": 5, "loss": 2.0, "epoch": 0.5}, {"step": 10, "loss": None}, {"loss": 1}, {"step": "x"}])
    assert metrics.last_step == 10
    assert metrics["loss"].points() == [(5, 2.0)]
    assert metrics["loss"].num_undefined == 1
    assert metrics.last_values() == {"loss": 2.0, "epoch": 0.5}
    assert metrics.last("eval_loss") is None


def test_columns_of_the_parts():
    metrics = Metrics([{"step": 1, "learning_rate/connector": 1e-3, "learning_rate/head": 1e-4}])
    assert {part: column.last for part, column in metrics.starting_with("learning_rate/").items()} == {
        "connector": 1e-3, "head": 1e-4
    }  # fmt: skip


def test_the_end_of_a_long_log_comes_with_its_last_evaluation(tmp_path: Path):
    lines = [*logged([3.0, 2.0]), *({"step": step, "loss": 1.0} for step in range(30, 5000))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    last = read_last_metrics(Folder(tmp_path))
    assert last.last_step == 4999
    assert len(last["loss"].values) < 4000
    assert last.last("eval_loss") == 2.1
    text = (tmp_path / "metrics.jsonl").read_text().replace("eval_loss", "eval_colour_loss")  # of several heads
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_last_metrics(Folder(tmp_path)).last("eval_colour_loss") == 2.1
    assert len(read_last_metrics(Folder(tmp_path / "nowhere"))) == 0
