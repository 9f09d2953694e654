"""One run at a time trains in a directory; a lock that its run left behind stops nobody."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import run_ranks
from tests.waiting import wait_until
from vlm.train.resume import lock
from vlm.train.resume.lock import HOLDER_FILE, RunLock, read_holder

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from vlm.train.resume.lock import RunLock

with RunLock(Path(sys.argv[1])):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(600)
"""
"""A process that holds a lock, with a data worker that outlives it."""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock of `tmp_path`; its `stdout` has the id of its worker."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: (tmp_path / HOLDER_FILE).exists(), process)
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_who_has_the_directory(tmp_path: Path, other: subprocess.Popen[str]):
    told = rf"another run is training in it \(process {other.pid} on {socket.gethostname()}, since 2"
    with pytest.raises(ValueError, match=told), RunLock(tmp_path):
        pass
    assert read_holder(tmp_path) is not None


def test_the_lock_ends_with_its_process_though_a_worker_lives_on(tmp_path: Path, other: subprocess.Popen[str]):
    assert other.stdout is not None
    worker = int(other.stdout.readline())
    other.kill()
    other.wait()
    os.kill(worker, 0)
    with RunLock(tmp_path):
        holder = read_holder(tmp_path)
        assert holder is not None
        assert holder.pid == os.getpid()
    os.kill(worker, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def leave_lock(folder: Path, age: float) -> None:
    """Leave the files of a run on another machine that gave its last sign of life `age` seconds ago."""
    (folder / HOLDER_FILE).write_text(json.dumps({"host": "another", "pid": 1, "since": 0.0}))
    then = time.time() - age
    os.utime(folder / HOLDER_FILE, (then, then))


def test_a_run_on_another_machine_without_a_sign_of_life_is_dead(tmp_path: Path):
    leave_lock(tmp_path, 3600)
    with RunLock(tmp_path):
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every few milliseconds."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.5)


def test_a_run_on_another_machine_is_waited_for(tmp_path: Path, quick: None):
    leave_lock(tmp_path, 0)
    with RunLock(tmp_path):
        holder = read_holder(tmp_path)
    assert holder is not None
    assert holder.host == socket.gethostname()


def test_a_run_on_another_machine_that_shows_life_is_left_alone(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
):
    leave_lock(tmp_path, 0)

    def sleep(seconds: float) -> None:
        os.utime(tmp_path / HOLDER_FILE)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(ValueError, match=r"another run is training in it \(process 1 on another"), RunLock(tmp_path):
        pass


def test_the_holder_shows_life(tmp_path: Path, quick: None):
    with RunLock(tmp_path):
        first = (tmp_path / HOLDER_FILE).stat().st_mtime_ns
        wait_until(lambda: (tmp_path / HOLDER_FILE).stat().st_mtime_ns != first)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    with pytest.raises(ValueError, match=rf"trainer\.output_dir={folder}: cannot be written to \(.*\); choose another"):
        RunLock(folder).acquire()


def test_a_directory_is_moved_with_its_lock_released(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    held = RunLock(tmp_path / "run")
    held.acquire()
    held.move(tmp_path / "run.1")
    assert [file.name for file in (tmp_path / "run.1").iterdir()] == ["metrics.jsonl"]
    with RunLock(tmp_path / "run"):
        pass


def test_ranks_that_are_refused_say_so_once(tmp_path: Path, common: list[str]):
    """No rank waits for the first, or ends with a traceback."""
    words = ["-cn", "pretrain-smol", *common, f"trainer.output_dir={tmp_path / 'run'}"]
    with RunLock(tmp_path / "run"):
        first, second = run_ranks("vlm", words)
    assert first.returncode == 1
    assert "another run is training in it" in first.stderr
    assert "Traceback" not in first.stderr + second.stderr
