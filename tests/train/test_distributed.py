"""What ranks tell each other."""

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.waiting import HANG, wait_until
from vlm.train import distributed as ranks
from vlm.train.distributed import on_rank0, rank0_lock


def test_while_another_run_has_a_lock_ranks_hear_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Each try ends in a word to the others, so that none waits for longer than one; the log says it once."""
    other = FileLock(tmp_path / "store" / "lock", thread_local=False)
    (tmp_path / "store").mkdir()
    other.acquire()
    told: list[Any] = []

    def telling(value: Any) -> Any:
        told.append(value)
        if len(told) == 3:
            other.release()
        return value

    monkeypatch.setattr(ranks, "PATIENCE", 0.02)
    monkeypatch.setattr(ranks, "broadcast_from_rank0", telling)
    with caplog.at_level(logging.INFO), rank0_lock(tmp_path / "store" / "lock", "it counts") as first:
        assert first
        assert told == [False, False, False, True]
        assert not ranks._acquire(FileLock(tmp_path / "store" / "lock"))
    assert len([record for record in caplog.records if "holds" in record.message]) == 1
    assert ranks._acquire(FileLock(tmp_path / "store" / "lock"))


def test_another_rank_waits_for_word_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = iter([False, False, True])
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks, "broadcast_from_rank0", lambda value: next(words))
    with rank0_lock(tmp_path / "store" / "lock", "it counts") as first:
        assert not first
    assert not list(words)
    assert not list(tmp_path.iterdir())


RANK = """
import sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from tests.waiting import HANG, wait_until
from vlm.train import distributed as ranks
folder, rank, ranks.PATIENCE = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
timeout = timedelta(seconds=float(sys.argv[4]))
dist.init_process_group(
    "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timeout
)
(folder / f"ready{rank}").touch()
with ranks.rank0_lock(folder / "lock", "it counts") as first:
    print(first)
    ranks.barrier()
"""


GROUP_TIMEOUT = 30
"""Seconds that a rank waits for another: a rank that is asked each second has to miss thirty of them to be given up."""


@pytest.mark.slow
@pytest.mark.parametrize(("patience", "codes"), [("1", [0, 0]), ("100", [1, 1])])
def test_two_ranks_wait_for_longer_than_for_each_other(tmp_path: Path, patience: str, codes: list[int]):
    """One would give the other up, if it heard nothing."""
    with FileLock(tmp_path / "lock"):
        words = [sys.executable, "-c", RANK, str(tmp_path)]
        started = [
            subprocess.Popen([*words, rank, patience, str(GROUP_TIMEOUT)], stderr=subprocess.DEVNULL)
            for rank in ("0", "1")
        ]
        wait_until(lambda: len(list(tmp_path.glob("ready?"))) == 2, *started)
        if any(codes):
            assert [process.wait(HANG) for process in started] == codes
        else:
            time.sleep(1.2 * GROUP_TIMEOUT)  # longer than ranks wait for each other
    assert [process.wait(HANG) for process in started] == codes


def test_what_rank_0_finds_ends_all_ranks(monkeypatch: pytest.MonkeyPatch):
    """It raises its error, and the others end without a message of their own."""

    def fail() -> None:
        raise ValueError("no room")

    assert on_rank0(lambda: 3) == 3
    with pytest.raises(ValueError, match="no room"):
        on_rank0(fail)
    monkeypatch.setattr(ranks, "broadcast_from_rank0", lambda value: (True, None))  # as another rank hears it
    with pytest.raises(SystemExit) as ended:
        on_rank0(lambda: None)
    assert ended.value.code == 1
