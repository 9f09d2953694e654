"""Locks of compilations whose process is gone, and those of living ones."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG, wait_until
from vlm.train import extension_locks
from vlm.train.extension_locks import extensions_folder, file_system_of, release_stale_locks

COMPILER = [sys.executable, "-c", f"import time; time.sleep({HANG})"]


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of an extension, on a disk of this machine."""
    monkeypatch.setattr(extension_locks, "LOCAL_FILE_SYSTEMS", {file_system_of(tmp_path)})
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    return tmp_path / "cpu_adam" / "lock"


def test_a_lock_that_nobody_holds_goes_and_so_do_its_compilers(lock: Path, caplog: pytest.LogCaptureFixture):
    with subprocess.Popen(COMPILER, cwd=lock.parent) as compiler, caplog.at_level(logging.INFO):
        wait_until(lambda: Path(f"/proc/{compiler.pid}/cwd").resolve() == lock.parent)
        release_stale_locks(lock.parents[1])
        assert compiler.wait(HANG) == -9
    assert not lock.exists()
    assert f"Removed {lock}" in caplog.text


def test_the_shell_of_a_terminal_lives_on(lock: Path):
    """Its user has gone into the folder to see what hangs; it leads its session, and no compiler does."""
    with subprocess.Popen(COMPILER, cwd=lock.parent, start_new_session=True) as shell:
        wait_until(lambda: Path(f"/proc/{shell.pid}/cwd").resolve() == lock.parent)
        release_stale_locks(lock.parents[1])
        assert not lock.exists()
        assert shell.poll() is None
        shell.kill()


def test_a_lock_that_a_process_holds_stays(lock: Path):
    held = os.open(lock, os.O_RDONLY)
    try:
        release_stale_locks(lock.parents[1])
        assert lock.exists()
    finally:
        os.close(held)


def test_a_lock_that_another_machine_may_hold_is_pointed_out(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(extension_locks, "file_system_of", lambda path: "nfs4")
    release_stale_locks(lock.parents[1])
    assert lock.exists()
    assert f"{lock}: no process of this machine holds this lock" in caplog.text


def test_the_folder_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert extensions_folder() == tmp_path / "torch_extensions"
    release_stale_locks(extensions_folder())  # where nothing was ever compiled
