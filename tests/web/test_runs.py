"""Runs as the page finds, starts, stops and reads them: without a browser."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vlm.web import jobs
from vlm.web.runs import (
    checkpoints,
    find_run,
    find_runs,
    has_heads,
    last_metrics,
    last_samples,
    log_tail,
    loss_rows,
    read_metrics,
    render_terminal_text,
)

SLEEPS = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(120)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun', flush=True); time.sleep(120)",
]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)']); "
    "print(child.pid, flush=True); child.wait()",
]


def wait_until(true, seconds: float = 20.0) -> None:
    """Wait for something, not for ever."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def has_started(folder: Path) -> bool:
    return bool(log_tail(folder / jobs.LOG_FILE))


def write_run(folder: Path, *lines: dict, final: str | None = None, config: str = "") -> Path:
    """A run directory as a run on the command line leaves it."""
    folder.mkdir(parents=True)
    (folder / "command.txt").write_text("vlm -cn pretrain-smol\n")
    (folder / "config.yaml").write_text(config or "trainer: {max_steps: -1, num_train_epochs: 2}\n")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if final is not None:
        (folder / "final").mkdir()
        (folder / "final" / "config.json").write_text(json.dumps({"model_type": final}))
    return folder


@pytest.fixture
def started(tmp_path: Path):
    """Starts jobs, and ends those that a test left."""
    folders = []

    def start(command: list[str], name: str = "run") -> Path:
        folders.append(tmp_path / name)
        jobs.start(command, tmp_path / name)
        wait_until(lambda: has_started(tmp_path / name))
        return tmp_path / name

    yield start
    for folder in folders:
        job = jobs.read_job(folder)
        if job is not None and job.is_alive():
            os.killpg(job.pid, 9)


def test_a_run_is_found_again_from_disk_and_stopped(started, tmp_path: Path):
    folder = started(SLEEPS)
    assert [(run.name, run.state) for run in find_runs(tmp_path)] == [("run", "running")]
    jobs.stop(folder)
    wait_until(lambda: not jobs.read_job(folder).is_alive())
    assert find_run(tmp_path, "run").state == "stopped"
    with pytest.raises(ValueError, match="has ended already"):
        jobs.stop(folder)


def test_what_a_run_started_ends_with_it(started):
    folder = started(PARENT)
    child = int(log_tail(folder / jobs.LOG_FILE))
    assert psutil.pid_exists(child)
    jobs.stop(folder)
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_a_run_that_does_not_end_is_killed_only_after_it_was_asked(started, tmp_path: Path, monkeypatch):
    folder = started(STUBBORN)
    with pytest.raises(ValueError, match="ask the run to stop first"):
        jobs.kill(folder)
    jobs.stop(folder)
    assert find_run(tmp_path, "run").state == "ending"
    assert not jobs.can_kill(jobs.read_job(folder))
    monkeypatch.setattr(jobs, "PATIENCE", 0.0)
    assert jobs.can_kill(jobs.read_job(folder))
    jobs.kill(folder)
    wait_until(lambda: not jobs.read_job(folder).is_alive())


def test_a_run_that_ends_by_itself_without_a_model_failed(started, tmp_path: Path):
    started([sys.executable, "-c", "print('no such file'); raise SystemExit(1)"])
    wait_until(lambda: find_run(tmp_path, "run").state == "failed")


def test_another_process_with_the_number_is_not_the_run(started):
    folder = started(SLEEPS)
    job = jobs.read_job(folder)
    assert job.is_alive()
    stale = {**json.loads((folder / jobs.JOB_FILE).read_text()), "began": job.began - 60}
    (folder / jobs.JOB_FILE).write_text(json.dumps(stale))
    assert not jobs.read_job(folder).is_alive()
    with pytest.raises(ValueError, match="has ended already"):
        jobs.stop(folder)
    assert psutil.pid_exists(job.pid), "the process that has the number now is left alone"
    (folder / jobs.JOB_FILE).write_text(json.dumps({**stale, "began": job.began}))


def test_a_run_of_another_machine_is_not_stopped_here(started, tmp_path: Path):
    folder = started(SLEEPS)
    content = json.loads((folder / jobs.JOB_FILE).read_text())
    (folder / jobs.JOB_FILE).write_text(json.dumps({**content, "host": "elsewhere"}))
    with pytest.raises(ValueError, match="started on elsewhere; stop it there"):
        jobs.stop(folder)
    assert find_run(tmp_path, "run").state == "not finished"
    (folder / jobs.JOB_FILE).write_text(json.dumps(content))
    assert jobs.read_job(folder).is_alive()


def test_no_second_run_in_a_folder(started):
    folder = started(SLEEPS)
    with pytest.raises(ValueError, match="a run is going on there"):
        jobs.start(SLEEPS, folder)


def test_a_run_outlives_the_page(tmp_path: Path):
    code = "import sys; from pathlib import Path; from vlm.web import jobs; jobs.start(sys.argv[2:], Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run"), *SLEEPS], check=True)
    assert find_run(tmp_path, "run").state == "running"
    jobs.stop(tmp_path / "run")
    wait_until(lambda: find_run(tmp_path, "run").state == "stopped")


def test_words_are_no_shell(started, tmp_path: Path):
    word = f"a; touch {tmp_path / 'touched'} $(touch {tmp_path / 'touched'})"
    folder = started([sys.executable, "-c", "import sys; print(sys.argv[1])", word])
    assert log_tail(folder / jobs.LOG_FILE) == word
    assert not (tmp_path / "touched").exists()


# Reading


def test_runs_are_read_from_their_directories(tmp_path: Path):
    logged = [{"step": 5, "loss": 2.0, "epoch": 0.5}, {"step": 10, "loss": None, "epoch": 1.0}]
    write_run(tmp_path / "demo" / "half", *logged)
    write_run(tmp_path / "done", {"step": 3, "loss": 1.5}, final="vlm")
    write_run(tmp_path / "head", final="vlm_prediction")
    (tmp_path / "data").mkdir()
    found = {run.name: run for run in find_runs(tmp_path)}
    assert found.keys() == {"demo/half", "done", "head"}
    half = found["demo/half"]
    assert (half.state, half.step, half.loss, half.progress) == ("not finished", 10, 2.0, 0.5)
    assert (found["done"].state, found["done"].progress) == ("finished", 1.0)
    assert checkpoints(tmp_path, heads=False) == [str(tmp_path / "done" / "final")]
    assert checkpoints(tmp_path, ["owner/name"], heads=True) == ["owner/name", str(tmp_path / "head" / "final")]
    assert has_heads("owner/name") is None


def test_no_folder_beside_the_runs_is_read(tmp_path: Path):
    write_run(tmp_path / "secret")
    write_run(tmp_path / "outputs" / "run")
    assert find_run(tmp_path / "outputs", "../secret") is None
    assert find_run(tmp_path / "outputs", None) is None
    assert find_run(tmp_path / "outputs", "run") is not None
    assert find_runs(tmp_path / "nothing") == []


def test_progress_is_of_the_steps_where_they_are_given(tmp_path: Path):
    write_run(tmp_path / "run", {"step": 5, "epoch": 0.1}, config="trainer: {max_steps: 20, num_train_epochs: 3}\n")
    assert find_run(tmp_path, "run").progress == 0.25


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path):
    write_run(tmp_path / "run", {"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert loss_rows(read_metrics(tmp_path / "run")) == [(1, 2.0, "training"), (2, 1.0, "evaluation")]


def test_of_a_long_run_the_end_is_read_and_a_plot_has_not_every_point(tmp_path: Path):
    lines = [{"step": step, "loss": step / 2, "epoch": 2 * step / 5000} for step in range(1, 5001)]
    folder = write_run(tmp_path / "run", *lines)
    run = find_run(tmp_path, "run")
    assert (run.step, run.loss, run.progress) == (5000, 2500.0, 1.0)
    assert len(last_metrics(folder)) < 5000
    rows = loss_rows(read_metrics(folder))
    assert len(rows) == 1000
    assert rows[-1] == (5000, 2500.0, "training")
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("  0%|  | 0/9\r 50%|# | 4/9\r100%|##| 9/9\ndone\n", "100%|##| 9/9\ndone\n"),
        ("half\r\nwhole", "half\nwhole"),
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07and\x00 bell\x07", "red and bell"),
        ("left\r", "left"),
    ],
)
def test_logs_read_as_on_a_terminal(written: str, shown: str):
    assert render_terminal_text(written) == shown


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path):
    (tmp_path / "log").write_bytes(b"".join(b"line %d \xff\n" % number for number in range(50_000)))
    lines = log_tail(tmp_path / "log").splitlines()
    assert len(lines) == 200
    assert lines[-1].startswith("line 49999")


def test_the_last_samples_are_shown(tmp_path: Path):
    (tmp_path / "samples.md").write_text(
        "## Step 1\n\n- **question**: old?\n- **reference**: a\n- **answer**: b\n\n## Step 20\n\n"
        "![sample 0](samples/0.png)\n\n- **question**: what?\n- **reference**: red\n- **answer**: <b>blue</b>\n\n"
        "- **question**: no picture?\n- **reference**: x\n- **answer**: ![](http://elsewhere/x.png)\n\n"
    )
    title, found = last_samples(tmp_path)
    assert title == "Step 20"
    assert [one["question"] for one in found] == ["what?", "no picture?"]
    assert found[0]["picture"] == str(tmp_path / "samples" / "0.png")
    assert "picture" not in found[1]
    assert last_samples(tmp_path / "nowhere") == ("", [])


def test_the_view_escapes_what_a_run_wrote(tmp_path: Path):
    gradio = pytest.importorskip("gradio")
    from vlm.web.run_view import RunView

    folder = write_run(tmp_path / "run", {"step": 1, "loss": 2.0})
    (folder / "samples.md").write_text("## Step 1\n\n- **question**: <script>x</script>\n- **answer**: <img src=x>\n")
    with gradio.Blocks(analytics_enabled=False):
        view = RunView(tmp_path)
    assert view.refresh("run")[0] == "run"
    page = "".join(one for one in view.refresh("run") if isinstance(one, str))
    assert "<script>" not in page
    assert "&lt;img src=x&gt;" in page
    assert view.refresh("../run")[0] is None
