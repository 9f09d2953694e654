"""A disk that fills up while a run trains: what was saved stays whole, and the run says what is missing."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture.runs import KINDS, check_ended, different_weights, final_weights, train


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory that can be made larger: a folder of `tmp_path`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size: int) -> None:
    """Give the file system so many bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.torture
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_a_full_disk_costs_nothing_that_was_saved(
    common: list[str], labelled: Path, small_disk: Path, tmp_path: Path, share: float
):
    """The disk has room for a share of what the run writes; with more, the same command ends as undisturbed."""
    kind = KINDS["padded"]
    quiet = tmp_path / "quiet"
    check_ended(train(kind.command(common, labelled, quiet)))
    resize(small_disk, round(share * size_of(quiet)))
    command = kind.command(common, labelled, small_disk / "run")
    (ended,) = train(command)
    assert ended.returncode in (0, 1), ended.stderr[-3000:]
    if ended.returncode:
        assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
        assert "free" in ended.stderr
        assert not list((small_disk / "run").glob("*.damaged"))
    resize(small_disk, 64 << 20)
    check_ended(train(command))
    assert different_weights(final_weights(quiet), final_weights(small_disk / "run")) == []
