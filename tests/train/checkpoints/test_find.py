"""Which checkpoint a run goes on from, and which ones are kept."""

import errno
import logging
import os
from pathlib import Path

import pytest

from vlm.train.checkpoints import find
from vlm.train.checkpoints.files import UNFINISHED
from vlm.train.checkpoints.find import (
    find_whole_checkpoint,
    list_checkpoints,
    remove_old_checkpoints,
    require_own_checkpoint,
    require_whole_checkpoint,
    set_aside_later,
)
from vlm.train.checkpoints.manifest import MANIFEST, Manifest, hash_file


def write(run: Path, step: int) -> Path:
    checkpoint = run / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes([step]) * 100)
    Manifest(step, 1, {"weights": hash_file(checkpoint / "weights")}).write(checkpoint)
    return checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 4, 10):
        write(tmp_path / "run", step)
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_the_newest_is_taken_by_its_number(run: Path):
    assert find_whole_checkpoint(run) == run / "checkpoint-10"
    assert find_whole_checkpoint(run / "nowhere") is None


def test_damaged_ones_are_set_aside_and_the_one_before_is_taken(run: Path, caplog: pytest.LogCaptureFixture):
    (run / "checkpoint-10" / "weights").write_bytes(b"\0" * 100)
    (run / "checkpoint-4" / MANIFEST).unlink()
    (run / "checkpoint-4.damaged").mkdir()
    assert find_whole_checkpoint(run) == run / "checkpoint-2"
    assert names(run) == ["checkpoint-10.damaged", "checkpoint-2", "checkpoint-4.damaged", "checkpoint-4.damaged-2"]
    assert "checkpoint-10 is damaged: weights has changed since it was written: its hash differs" in caplog.text
    assert "it was renamed to checkpoint-10.damaged" in caplog.text
    (run / "checkpoint-2" / "weights").unlink()
    assert find_whole_checkpoint(run) is None


def test_folders_of_other_names_are_no_checkpoints(run: Path):
    for name in ("checkpoint-best", "checkpoint-12.damaged", "checkpoint-", "checkpoint-7-old", "checkpoint-07"):
        (run / name).mkdir()
    (run / "checkpoint-99").write_text("a file")
    assert list(list_checkpoints(run)) == [10, 4, 2]
    before = names(run)
    assert find_whole_checkpoint(run) == run / "checkpoint-10"
    remove_old_checkpoints(run, 3)
    assert names(run) == before


def test_a_renamed_checkpoint_is_not_taken_for_another_step(run: Path):
    (run / "checkpoint-10").rename(run / "checkpoint-12")
    assert find_whole_checkpoint(run) == run / "checkpoint-4"


def test_a_checkpoint_of_an_earlier_version_is_taken_and_said_to_be_unchecked(
    run: Path, caplog: pytest.LogCaptureFixture
):
    (run / "checkpoint-10" / MANIFEST).unlink()
    (run / "checkpoint-10" / "complete").touch()
    assert find_whole_checkpoint(run) == run / "checkpoint-10"
    assert "its files were not checked" in caplog.text


def test_a_named_checkpoint_has_to_be_whole(run: Path):
    assert require_whole_checkpoint(run / "checkpoint-4") == run / "checkpoint-4"
    (run / "checkpoint-4" / "weights").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-4: weights has 0 bytes instead of 100\. Name another checkpoint"):
        require_whole_checkpoint(run / "checkpoint-4")
    assert (run / "checkpoint-4").is_dir()


def test_what_a_killed_run_was_about_to_replace_is_there_again(run: Path):
    (run / UNFINISHED).mkdir()
    (run / "checkpoint-10").rename(run / UNFINISHED / "checkpoint-10.replaced")
    (run / "checkpoint-4").rename(run / UNFINISHED / "checkpoint-4")
    assert find_whole_checkpoint(run) == run / "checkpoint-10"


def test_as_many_whole_ones_are_kept_as_the_limit_says(run: Path):
    write(run, 12)
    (run / "checkpoint-10" / "weights").write_bytes(b"short")
    remove_old_checkpoints(run, None)
    assert len(names(run)) == 4
    remove_old_checkpoints(run, 2)
    assert names(run) == ["checkpoint-10", "checkpoint-12", "checkpoint-4"]
    remove_old_checkpoints(run, 1)
    assert names(run) == ["checkpoint-10", "checkpoint-12"]


def test_one_that_cannot_be_removed_stays(run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def fails(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(find, "remove_folder", fails)
    remove_old_checkpoints(run, 2)
    assert "checkpoint-2 could not be removed ([Errno 28] No space left on device)" in caplog.text


def test_the_best_one_stays_besides(run: Path):
    remove_old_checkpoints(run, 1, best_step=2)
    assert names(run) == ["checkpoint-10", "checkpoint-2"]


def test_later_ones_are_of_another_history(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        set_aside_later(run / "checkpoint-4", tmp_path / "another run")
        assert names(run) == ["checkpoint-10", "checkpoint-2", "checkpoint-4"]
        set_aside_later(run / "checkpoint-4", run)
    assert names(run) == ["checkpoint-10.superseded", "checkpoint-2", "checkpoint-4"]
    assert "checkpoint-10 is later than checkpoint-4, from which the run resumes" in caplog.text


@pytest.mark.parametrize("place", ["elsewhere/checkpoint-1", "run/link"])
def test_pickles_of_others_are_not_read(tmp_path: Path, place: str):
    """Those of DeepSpeed run code when they are read."""
    (tmp_path / "elsewhere" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere" / "checkpoint-1")
    require_own_checkpoint(tmp_path / "run" / "checkpoint-1", tmp_path / "run")
    with pytest.raises(ValueError, match="only read checkpoints in their own directory"):
        require_own_checkpoint(tmp_path / place, tmp_path / "run")


@pytest.mark.parametrize("way", ["file", "folder", "latest", "root", "nothing"])
def test_a_checkpoint_of_its_own_does_not_lead_elsewhere(tmp_path: Path, way: str):
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "global_step1").mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step1\n")
    (checkpoint / "linked").symlink_to(checkpoint / "global_step1")
    require_own_checkpoint(checkpoint, tmp_path / "run")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.pt").write_bytes(b"pickle")
    if way == "file":
        (checkpoint / "global_step1" / "a.pt").symlink_to(tmp_path / "theirs" / "a.pt")
    elif way == "folder":
        (checkpoint / "global_step2").symlink_to(tmp_path / "theirs")
    else:
        content = {"latest": "../../theirs", "root": str(tmp_path / "theirs"), "nothing": ""}[way]
        (checkpoint / "latest").write_text(content)
    with pytest.raises(ValueError, match="such runs only read checkpoints in their own directory"):
        require_own_checkpoint(checkpoint, tmp_path / "run")
