"""What errors of the file system mean, in words that name the disk."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm.checks import disk


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_345_678_901, "12.3 GB"), (4e15, "4000.0 TB")],
)
def test_sizes_as_people_read_them(count: float, text: str):
    assert disk.format_bytes(count) == text


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path):
    assert disk.nearest_folder(tmp_path / "a" / "b") == tmp_path
    assert disk.mount_point(tmp_path / "a" / "b").is_mount()
    assert disk.free_bytes(tmp_path / "a" / "b") == pytest.approx(disk.free_bytes(tmp_path), rel=0.1)
    assert disk.write_problem(tmp_path / "a" / "b") is None


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    assert disk.write_problem(tmp_path / "file" / "run") == f"{tmp_path / 'file'} is a file; a folder is needed"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert disk.write_problem(tmp_path) == f"you have no permission to write to {tmp_path}"
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert "mounted read-only" in str(disk.write_problem(tmp_path))


def error(number: int, *file: Path) -> OSError:
    return OSError(number, os.strerror(number), *map(str, file))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mount = disk.mount_point(tmp_path)
    said = disk.describe_disk_error(error(errno.ENOSPC, tmp_path / "config.yaml"))
    assert said is not None
    assert said.startswith(f"The disk {mount} (")
    assert f"it is full, while {tmp_path / 'config.yaml'} was written" in said
    monkeypatch.setattr(disk, "free_bytes", lambda path: 512)
    assert f"{mount} (512 bytes free)" in str(disk.describe_disk_error(error(errno.ENOSPC), [tmp_path]))
    assert "its quota is used up" in str(disk.describe_disk_error(error(errno.EDQUOT)))


def test_a_file_that_may_not_be_written_is_named(tmp_path: Path):
    said = disk.describe_disk_error(error(errno.EROFS, tmp_path / "metrics.jsonl"))
    assert said == f"{tmp_path / 'metrics.jsonl'} cannot be written (Read-only file system): choose another folder"


def test_other_errors_are_not_of_disks():
    assert disk.describe_disk_error(error(errno.ENOENT, Path("x"))) is None
    assert disk.describe_disk_error(error(errno.ECONNRESET)) is None


@pytest.mark.parametrize(
    ("failure", "is_of_writing"),
    [
        (error(errno.ENOSPC), True),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), True),
        (Exception("No space left on device (os error 28)"), True),
        (RuntimeError("CUDA out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_say_that_nothing_could_be_written(failure: BaseException, is_of_writing: bool):
    assert disk.is_write_error(failure) == is_of_writing
