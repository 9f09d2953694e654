"""Evaluations and exports as jobs: found again from disk, stopped, one at a time, and no runs."""

import sys
from pathlib import Path

import pytest

from tests.waiting import HANG, wait_until
from vlm.web import jobs
from vlm.web.runs import find_runs
from vlm.web.tasks import EVALUATION, EXPORT, Task, check_idle, find_tasks, start_task

SLEEPS = [sys.executable, "-c", f"import time; print('begun', flush=True); time.sleep({HANG})"]


def ends_with(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_task_is_stopped_and_nothing_else_starts_beside_it(tmp_path: Path):
    started = start_task(tmp_path, Task(EVALUATION, "Evaluation of a on b", str(tmp_path / "result")), SLEEPS)
    try:
        assert [(task.state, task.progress) for task in find_tasks(tmp_path)] == [("running", None)]
        assert find_tasks(tmp_path)[0].seconds is not None
        assert find_tasks(tmp_path, EXPORT) == []
        assert find_runs(tmp_path) == []
        with pytest.raises(ValueError, match="Evaluation of a on b is still running"):
            check_idle(tmp_path)
        with pytest.raises(ValueError, match="still running"):
            start_task(tmp_path, Task(EXPORT, "Export", "x"), SLEEPS)
    finally:
        jobs.stop(started.folder)
    wait_until(lambda: find_tasks(tmp_path)[0].state == "stopped")
    assert find_tasks(tmp_path)[0].seconds is None
    check_idle(tmp_path)


def test_a_task_is_finished_when_its_result_is_there(tmp_path: Path):
    result = tmp_path / "result"
    code = f"from pathlib import Path; Path({str(result)!r}).mkdir(); Path({str(result)!r}, 'results.json').touch()"
    start_task(tmp_path, Task(EVALUATION, "one", str(result)), ends_with(code))
    wait_until(lambda: find_tasks(tmp_path)[0].state == "finished")
    start_task(
        tmp_path, Task(EVALUATION, "two", str(tmp_path / "other")), ends_with("print('\\r 40%|## | 4/10', end='')")
    )
    wait_until(lambda: find_tasks(tmp_path)[0].state == "failed")
    assert [task.task.title for task in find_tasks(tmp_path)] == ["two", "one"]
    assert [task.progress for task in find_tasks(tmp_path)] == [0.4, 1.0]
