"""Runs as the page starts and stops them, and finds them again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import HANG, wait_until
from vlm.web import jobs
from vlm.web.runs import find_run, find_runs, log_tail

SLEEPS = [sys.executable, "-c", f"import time; print('begun', flush=True); time.sleep({HANG})"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun', flush=True); "
    f"time.sleep({HANG})",
]
PARENT = [
    sys.executable,
    "-c",
    f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep({HANG})']); "
    "print(child.pid, flush=True); child.wait()",
]


def has_started(folder: Path) -> bool:
    return bool(log_tail(folder / jobs.LOG_FILE))


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


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; its parent may not have read its exit code."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_a_run_started_ends_with_it(started):
    folder = started(PARENT)
    child = int(log_tail(folder / jobs.LOG_FILE))
    assert psutil.pid_exists(child)
    jobs.stop(folder)
    wait_until(lambda: has_ended(child))


def test_a_run_that_does_not_end_is_killed_only_after_it_was_asked(started, tmp_path: Path, monkeypatch):
    folder = started(STUBBORN)
    with pytest.raises(ValueError, match="ask the run to stop first"):
        jobs.kill(folder)
    jobs.stop(folder)
    assert find_run(tmp_path, "run").state == "ending"
    assert not jobs.can_kill(jobs.read_job(folder))
    monkeypatch.setattr(jobs, "KILL_DELAY_SECONDS", 0.0)
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
    with pytest.raises(ValueError, match="a run is already active there"):
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
