"""Runs as their directories tell them."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from tests.runs.directories import logged, write_run, write_samples
from vlm.checks.weights import identify_weights
from vlm.runs.comparison import RunComparison
from vlm.runs.comparison_views import describe_comparison
from vlm.runs.read import RunDirectory, find_runs, read_run
from vlm.runs.report import make_report


def test_a_run_is_read_from_its_directory(tmp_path: Path):
    folder = write_run(tmp_path / "run", logged([3.0, 2.0]), settings={"trainer.seed": 7, "trainer.hub_token": "hush"})
    write_samples(folder, 20, ["an answer"])
    (folder / "changes.jsonl").write_text(
        '{"step": 10, "time": "t", "changes": {"trainer.seed": [7, 8], "data": [1]}}\n'
    )
    run = read_run(folder)
    assert (run.recipe, run.overrides["trainer.seed"], run.state, run.step) == ("finetune-smol", "7", "done", 20)
    assert (run.settings["trainer.seed"], run.settings["trainer.hub_token"]) == (8, "***")
    assert run.metrics["loss"].values == [3.0, 2.0]
    assert run.last_metrics.last("eval_loss") == 2.1
    assert run.samples[20][0].answer == "an answer"
    assert run.changes[0].values == {"trainer.seed": (7, 8)}
    assert (run.final, run.best, run.progress) == (folder / "final", None, 1.0)
    assert run.files.damaged == {}
    assert read_run(folder / "final").path == folder


def test_what_is_missing_is_empty(tmp_path: Path):
    run = RunDirectory(tmp_path)
    assert (run.config, run.commands, run.versions, run.data, run.parts, run.changes) == ({}, [], {}, {}, [], [])
    assert (run.step, run.max_steps, run.progress, run.seconds, run.speed, run.heads) == (0, None, None, None, {}, {})
    assert (run.skipped, run.guard, run.evaluations, run.checkpoints, run.samples) == ([], [], [], [], {})
    assert (run.state, run.final, run.recipe, run.overrides) == ("not finished", None, None, {})


def test_files_full_of_nonsense_are_named_and_nothing_raises(tmp_path: Path):
    names = ("config.yaml", "command.txt", "versions.json", "data.json", "parts.json", "changes.jsonl", "status.json",
             "metrics.jsonl", "speed.json", "samples.md", "skipped.jsonl", "guard.jsonl", "scores.json",
             "run.lock.json", "eval/x/results.json")  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'{"a": [\xff\x00"\n\n- x: : y\n')
    run = RunDirectory(tmp_path)
    values = [getattr(run, name) for name in dir(RunDirectory) if not name.startswith("_")]
    assert len(values) > 20
    assert {"config.yaml", "versions.json", "metrics.jsonl", "eval/x/results.json"} <= run.files.damaged.keys()


@pytest.mark.parametrize(
    ("status", "holder", "is_done", "state"),
    [
        (None, None, True, "done"),
        (None, None, False, "not finished"),
        (None, "this", False, "training"),
        ("evaluating", "this", False, "evaluating"),
        ("training", None, False, "failed"),
        ("training", "none", False, "failed"),
        ("stopped", None, False, "stopped"),
        ("nonsense", None, True, "done"),
    ],
)
def test_the_state_of_a_run(tmp_path: Path, status: str | None, holder: str | None, is_done: bool, state: str):
    folder = write_run(tmp_path / "run", is_done=is_done)
    if status is not None:
        (folder / "status.json").write_text(json.dumps({"state": status, "step": 12, "max_steps": 24}))
    if holder is not None:
        number = os.getpid() if holder == "this" else 2**22 + 1  # more than any process has
        (folder / "run.lock.json").write_text(json.dumps({"host": socket.gethostname(), "pid": number, "since": 0.0}))
    run = read_run(folder)
    assert run.state == state
    assert run.progress == (1.0 if state == "done" else 0.5 if status else None)


def test_a_run_on_another_machine_lives_by_its_signs(tmp_path: Path):
    folder = write_run(tmp_path / "run", is_done=False)
    file = folder / "run.lock.json"
    file.write_text(json.dumps({"host": "another", "pid": 1, "since": 0.0}))
    assert read_run(folder).is_alive
    os.utime(file, (time.time() - 3600,) * 2)
    assert not read_run(folder).is_alive


def test_evaluations_have_scores_with_intervals(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    (folder / "eval" / "val").mkdir(parents=True)
    score = {"value": 0.5, "low": 0.4, "high": None}
    (folder / "eval" / "val" / "results.json").write_text(json.dumps({"records": 8, "metrics": {"rouge": score}}))
    (folder / "eval" / "vqa" / "x").mkdir(parents=True)
    (folder / "eval" / "vqa" / "x" / "results.json").write_text(json.dumps({"results": {"gqa": {"acc": {"value": 1}}}}))
    assert {one.name: one.scores for one in read_run(folder).evaluations} == {
        "val": {"rouge": (0.5, 0.4, None)}, "vqa/x": {"gqa acc": (1, None, None)}
    }  # fmt: skip


def test_evaluations_of_replaced_weights_are_marked(tmp_path: Path):
    """In the report and in comparisons, where they count for nothing; unknown weights are not marked."""
    folders = [write_run(tmp_path / name) for name in ("replaced", "kept", "unknown")]
    for folder in folders:
        (folder / "final" / "model.safetensors").write_bytes(b"step 21")
        (folder / "eval" / "val").mkdir(parents=True)
        results: dict[str, object] = {"metrics": {"rouge": {"value": 0.5, "low": 0.4, "high": 0.6}}}
        if folder.name != "unknown":
            results["weights"] = identify_weights(f"{folder}/final/", folder / "final")
        (folder / "eval" / "val" / "results.json").write_text(json.dumps(results))
    (folders[0] / "final" / "model.safetensors").write_bytes(b"step 28")
    runs = list(map(read_run, folders))
    assert [run.evaluations[0].is_of_other_weights for run in runs] == [True, False, False]
    assert ["of other weights" in make_report(run) for run in runs] == [True, False, False]
    (row,) = RunComparison([runs[1], runs[0], runs[2]]).metrics
    assert [row.verdict(number) for number in (0, 1)] == ["not comparable", "within noise"]
    shown = describe_comparison(RunComparison(runs))
    assert "0.5 [0.4, 0.6] of other weights" in shown
    assert "different objectives" not in shown


def test_runs_are_found_in_folders_of_sweeps_and_nowhere_within_a_run(tmp_path: Path):
    write_run(tmp_path / "sweep" / "seed=1")
    write_run(tmp_path / "sweep" / "seed=2")
    write_run(tmp_path / "single" / "before" / "run")
    write_run(tmp_path / "sweep" / "seed=1" / "fold-0")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "command.txt").write_text("mine\n")
    assert {run.name for run in find_runs(tmp_path)} == {"sweep/seed=1", "sweep/seed=2", "single/before/run"}
    assert [run.name for run in find_runs(tmp_path / "sweep" / "seed=2")] == ["seed=2"]
    assert find_runs(tmp_path / "nowhere") == []


def test_a_folder_that_is_no_run_says_what_is_there(tmp_path: Path):
    write_run(tmp_path / "outputs" / "run")
    with pytest.raises(ValueError, match=r"runs are in it, such as .*outputs/run"):
        read_run(tmp_path / "outputs")
    with pytest.raises(ValueError, match="no such folder"):
        read_run(tmp_path / "nothing")
