"""What ranks tell each other, as far as one process shows it."""

import logging
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from vlm.train import ranks
from vlm.train.ranks import locked_by_first_rank


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
    monkeypatch.setattr(ranks, "as_first_rank", telling)
    with caplog.at_level(logging.INFO), locked_by_first_rank(tmp_path / "store" / "lock", "it counts") as first:
        assert first
        assert told == [False, False, False, True]
        assert not ranks._has(FileLock(tmp_path / "store" / "lock"))
    assert len([record for record in caplog.records if "holds" in record.message]) == 1
    assert ranks._has(FileLock(tmp_path / "store" / "lock"))


def test_another_rank_waits_for_word_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = iter([False, False, True])
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks, "as_first_rank", lambda value: next(words))
    with locked_by_first_rank(tmp_path / "store" / "lock", "it counts") as first:
        assert not first
    assert not list(words)
    assert not list(tmp_path.iterdir())
