"""The report that a run leaves however it ends."""

import sys
from pathlib import Path

import pytest

from tests.runs.directories import logged, write_run
from vlm.clusters.processes import GUARD_EXIT_CODE, SAVED_EXIT_CODE
from vlm.train.reporting import reporting


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, '<span class="state done">done'),
        (SAVED_EXIT_CODE, "did not finish"),
        (GUARD_EXIT_CODE, "The run failed"),
        ("an error", "The run failed"),
    ],
)
def test_a_run_that_ends_leaves_a_report(tmp_path: Path, code: int | str | None, said: str):
    folder = write_run(tmp_path / "run", logged([2.0]), is_done=False)
    with (
        pytest.raises((SystemExit, RuntimeError)) if code else reporting(folder, is_writer=False),
        reporting(folder, is_writer=True),
    ):
        if isinstance(code, int):
            sys.exit(code)
        if code:
            raise RuntimeError(code)
    assert said in (folder / "report.html").read_text()


def test_other_ranks_and_runs_that_had_not_begun_leave_none(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    with reporting(folder, is_writer=False):
        pass
    with reporting(tmp_path, is_writer=True):
        pass
    assert not list(tmp_path.glob("**/report.html"))
