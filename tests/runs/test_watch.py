"""`vlm watch`: what it shows of a run's files, what it says of old ones, and when it ends."""

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from vlm.cli import watch as command
from vlm.runs.watch import plot, read_live_run, render

LINES = [{"step": step, "loss": 6 - step / 5, "epoch": step / 6} for step in range(2, 20, 2)]


def write_run(folder: Path, state: str | None = "training", **status: Any) -> Path:
    """A run directory with a status, metrics and a log."""
    folder.mkdir(exist_ok=True)
    evaluation = {"step": 12, "eval_loss": 4.2, "eval_blank_loss": 6.3, "eval_image_gain": 2.1}
    lines = [*LINES, evaluation]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 20, "lo')
    (folder / "config.yaml").write_text("trainer: {}\n")
    (folder / "run.log").write_text("first\n\nline with \x1b[31m control\nlast\n")
    now = {"step": 18, "max_steps": 36, "loss": 2.4, "updated_at": time.time(), "host": "elsewhere", "pid": 1}
    if state is not None:
        (folder / "status.json").write_text(json.dumps(now | {"state": state} | status))
    return folder


def test_lines_of_the_log_are_whole_or_end_in_an_ellipsis(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    command = f"ask it  vlm generate {'outputs/' * 20}final"
    (folder / "run.log").write_text(f"{command}\n")
    run = read_live_run(folder)
    assert render(run, 80).endswith(command)
    assert render(run, 80, 60).splitlines()[-1] == f"{command[:79]}…"


def test_a_run_is_shown_from_its_files(tmp_path: Path):
    text = render(read_live_run(write_run(tmp_path / "run"), 2), 100)
    assert re.search(r"training on elsewhere, \d+ s ago", text)
    assert " 50%" in text
    assert "step 18/36  loss 2.4" in text
    assert "⠉" in text or "⠑" in text, "the loss is plotted"
    assert "evaluation at step 12:  loss 4.2  on blank images 6.3  image gain 2.1" in text
    assert text.endswith("line with \\x1b[31m control\nlast")
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_log_has_the_time_of_day_and_no_line_twice(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    lines = ["2026-11-30 23:25:20,127 INFO vlm.train.run: Run directory: x",
             "2026-11-30 23:25:27,546 INFO vlm.train.monitor.progress_line: step 2/18  loss 6.4",
             "2026-11-30 23:25:31,621 WARNING a.library: oh: no"]  # fmt: skip
    (folder / "run.log").write_text("\n".join(lines))
    assert read_live_run(folder).log == ["23:25:20  Run directory: x", "23:25:31  warning: oh: no"]


def test_a_low_terminal_shows_less_of_the_log(tmp_path: Path):
    run = read_live_run(write_run(tmp_path / "run"))
    assert len(render(run, 80, 20).splitlines()) <= 20
    assert "last" not in render(run, 80, 17)


def test_old_news_are_said_to_be_old(tmp_path: Path):
    run = read_live_run(write_run(tmp_path / "run", updated_at=time.time() - 3600))
    assert "training on elsewhere, but it has written nothing for 60 min" in render(run)
    assert not run.has_ended


def test_a_process_that_is_gone_has_ended(tmp_path: Path):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    run = read_live_run(write_run(tmp_path / "run", host=socket.gethostname(), pid=child))
    assert run.state == "gone"
    assert run.has_ended
    alive = read_live_run(write_run(tmp_path / "run", host=socket.gethostname(), pid=os.getpid()))
    assert alive.state == "training"


def test_runs_of_earlier_versions_have_no_status(tmp_path: Path):
    text = render(read_live_run(write_run(tmp_path / "run", None)))
    assert "state unknown: it has no status.json" in text
    assert "step 18  epoch 3.00  loss 2.4" in text


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("stopped", 0), ("failed", 1)])
def test_watching_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str, code: int):
    folder = write_run(tmp_path / "run", state, message="out of\x1b memory")
    for options in ([], ["--once"]):
        with pytest.raises(SystemExit) as ended:
            command.main([str(folder), *options])
        assert ended.value.code == code
    printed = capsys.readouterr().out
    assert printed.startswith(f"{state}  step 18/36")
    assert "out of\\x1b memory" in printed


def test_a_line_is_printed_for_each_change(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    folder = write_run(tmp_path / "run")
    states = iter(["training", "training", "evaluating", "done"])
    monkeypatch.setattr(command.time, "sleep", lambda seconds: write_run(folder, next(states)))
    assert command.watch(folder, 1.0, 3).state == "done"
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["training", "evaluating", "done"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"this is not a run directory; a run directory has config\.yaml"):
        read_live_run(tmp_path)
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=re.escape(f"runs are in it, such as {run}")):
        read_live_run(tmp_path)
    (run / "final").mkdir()
    assert read_live_run(run / "final").folder.resolve() == run


@pytest.mark.parametrize("status", [{"step": "x", "max_steps": []}, {"learning_rates": 3, "mfu": "a"}, {"state": 5}])
def test_a_strange_status_is_shown_as_far_as_it_goes(tmp_path: Path, status: dict[str, Any]):
    assert render(read_live_run(write_run(tmp_path / "run", **status))).startswith(str(tmp_path / "run"))


def test_a_plot_has_its_points_where_they_belong():
    lines = plot([(0, 1.0), (10, 0.0)], [(10, 1.0)], 10, 4)
    assert lines[0].startswith("       1 │")
    assert lines[0].endswith("o"), "the mark is at the end, above"
    assert lines[3].startswith("       0 │")
    assert lines[-1].split() == ["0", "step", "10"]
    assert len({len(line) for line in lines[-2:]}) == 1
    assert plot([(5, 1.0), (5, 1.0)], [], 10, 2), "one step alone"
