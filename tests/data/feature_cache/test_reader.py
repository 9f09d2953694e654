"""Packs of features: read by key, written whole or not at all, removed where nobody reads them."""

import mmap
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from vlm.data.feature_cache import store as feature_store
from vlm.data.feature_cache.reader import (
    FEATURES_FILE,
    FORMAT_FILE,
    INDEX_FILE,
    LOCK_FILE,
    FeatureFormat,
    ImageFeatures,
    Pack,
    open_all_packs,
    open_shared_pack,
)
from vlm.data.feature_cache.store import create_pack, finalize_pack, make_room, map_new_rows, remove_stale_packs

FORM_OF_ONE = FeatureFormat("bfloat16", 2, 3, stride=20)
"""Rows that do not touch: 12 bytes, 20 apart."""


def made(store: Path, name: str, *values: float, limit: float | None = None) -> Pack:
    """A pack of pictures of one view each, filled with these numbers."""
    with create_pack(store, name, len(values), FORM_OF_ONE, limit, []) as folder:
        rows = map_new_rows(folder, FORM_OF_ONE)
        for place, value in enumerate(values):
            rows[place] = torch.full((6,), value, dtype=torch.bfloat16).view(torch.uint8).numpy()
        numbers = np.arange(len(values))
        keys = [key_of(value) for value in values]
        finalize_pack(folder, FORM_OF_ONE, keys, numbers, np.ones_like(numbers), np.zeros((len(values), 2), int), {})
        return Pack(store / name)


def key_of(value: float) -> bytes:
    return np.array([7, int(value * 8)], dtype=np.uint64).tobytes()  # the first halves are all alike


def test_a_pack_is_read_by_key(tmp_path: Path):
    pack = made(tmp_path / "store", "a", 3.0, 1.0, 2.0)
    found = ImageFeatures([pack])
    for value in (1.0, 2.0, 3.0):
        seen = found.find(key_of(value))
        assert seen is not None
        assert torch.equal(found.read(seen), torch.full((1, 2, 3), value, dtype=torch.bfloat16))
    assert found.find(key_of(4.0)) is None


def test_what_was_not_used_for_longest_makes_room_and_what_is_read_stays(tmp_path: Path):
    store = tmp_path / "store"
    packs_ = {name: made(store, name, *range(10)) for name in ("a", "b", "c")}
    for age, name in enumerate(("b", "a", "c")):
        os.utime(store / name / "used", (age, age))
    packs_["a"].close()
    packs_["b"].close()
    made(store, "d", *range(10), limit=600e-9).close()
    assert {pack.folder.name for pack in open_all_packs(store)} == {"a", "c", "d"}, (
        "the oldest goes, and no more than that"
    )
    packs_["c"].touch()
    with pytest.raises(ValueError, match=r"need 5e-07 GB more in .*, where 6e-07 GB are in use; 6e-07 GB are allowed"):
        make_room(tmp_path, 500, 600e-9, [])
    assert {pack.folder.name for pack in open_all_packs(store)} == {"a", "c", "d"}, (
        "nothing goes where that is not enough"
    )
    assert torch.equal(packs_["c"].read(1, 1), torch.ones(1, 2, 3, dtype=torch.bfloat16))


def test_a_view_takes_whole_pages_of_its_file(tmp_path: Path):
    """Machines that share the folder over NFS write whole pages, and must not write each other's."""
    features = torch.arange(24.0).view(2, 4, 3)
    form = FeatureFormat.of(features)
    assert (form.nbytes, form.stride) == (48, mmap.PAGESIZE)
    assert FeatureFormat.of(torch.zeros(1, 197, 768)).stride == -(-197 * 768 * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
    with create_pack(tmp_path / "store", "a", 2, form, None, []) as folder:
        map_new_rows(folder, form)[:] = features.view(torch.uint8).flatten(1).numpy()
        assert (folder / FEATURES_FILE).stat().st_size == 2 * mmap.PAGESIZE
        zeros = np.zeros((2, 2), dtype=int)
        finalize_pack(folder, form, [key_of(0), key_of(1)], np.arange(2), np.ones(2, dtype=int), zeros, {})
    assert torch.equal(Pack(tmp_path / "store" / "a").read(0, 2), features)


def test_a_pack_that_nothing_refers_to_makes_room(tmp_path: Path):
    pack = made(tmp_path / "store", "a", 1.0)
    with pytest.raises(ValueError, match="need 2e-08 GB more"):
        make_room(tmp_path, 20, 30e-9, [])
    del pack
    make_room(tmp_path, 20, 30e-9, [])
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.parametrize("missing", [[], [FEATURES_FILE], [FORMAT_FILE], [INDEX_FILE, FORMAT_FILE], [LOCK_FILE]])
def test_what_is_left_of_a_removal_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]):
    """A process ended while it removed a pack; then one of the same name is made."""
    store = tmp_path / "store"
    made(store, "a", 1.0).close()

    def stops(folder: Path) -> None:
        for name in missing:
            (folder / name).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(feature_store.shutil, "rmtree", stops)
        with pytest.raises(KeyboardInterrupt):
            make_room(tmp_path, 20, 30e-9, [])
    assert not open_all_packs(store)
    assert len(made(store, "a", 1.0)) == 1
    assert [one.name for one in store.iterdir()] == ["a"]


@pytest.mark.parametrize("missing", [FEATURES_FILE, INDEX_FILE, FORMAT_FILE, LOCK_FILE])
def test_a_pack_that_lacks_a_file_is_made_again(tmp_path: Path, missing: str):
    store = tmp_path / "store"
    made(store, "a", 1.0).close()
    (store / "a" / missing).unlink()
    with made(store, "a", 1.0).folder.joinpath(missing).open("rb"):
        assert [one.name for one in store.iterdir()] == ["a"]


def test_a_pack_counts_once_while_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another run looks for room when all its files are written."""
    original = Path.rename
    refusals = []

    def looked(self: Path, target: Path) -> Path:
        with pytest.raises(ValueError, match="GB more") as refusal:
            make_room(tmp_path, 100, 50e-9, [])
        refusals.append(str(refusal.value))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", looked)
    assert len(made(tmp_path / "store", "a", 1.0, 2.0)) == 2
    assert len(refusals) == 1
    assert "where 4e-08 GB are in use" in refusals[0]


def test_files_that_go_meanwhile_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pack is removed by hand behind each look at the folders."""
    store = tmp_path / "store"
    original = Path.glob

    def behind(self: Path, pattern: str) -> list[Path]:
        found = list(original(self, pattern))
        shutil.rmtree(store / "a", ignore_errors=True)
        return found

    for look in (
        lambda: open_all_packs(store),
        lambda: make_room(tmp_path, 20, 30e-9, []),
        lambda: remove_stale_packs(tmp_path),
    ):
        made(store, "a", 1.0).close()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "glob", behind)
            assert not look()
        assert not (store / "a").exists()


def test_nothing_is_renamed_or_removed_without_the_roots_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held: list[bool] = []
    rename, rmtree = Path.rename, shutil.rmtree

    def is_held() -> bool:
        try:
            with FileLock(tmp_path / "lock", blocking=False, is_singleton=False):
                return False
        except Timeout:
            return True

    def renamed(self: Path, target: Path) -> Path:
        held.append(is_held())
        return rename(self, target)

    def removed(folder: Path) -> None:
        held.append(is_held())
        rmtree(folder)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(feature_store.shutil, "rmtree", removed)
    made(tmp_path / "store", "a", 1.0).close()
    made(tmp_path / "store", "b", 1.0, limit=30e-9).close()
    with pytest.raises(KeyboardInterrupt), create_pack(tmp_path / "store", "c", 1, FORM_OF_ONE, None, []):
        raise KeyboardInterrupt
    assert len(held) == 2 + 2 + 2
    assert all(held)
    assert [one.name for one in (tmp_path / "store").iterdir()] == ["b"]


def test_a_pack_that_another_machine_does_not_have_is_explained(tmp_path: Path):
    with pytest.raises(ValueError, match=r"another rank has it, .* must be a folder that all machines share"):
        open_shared_pack(tmp_path / "store" / "a")
    with pytest.raises(ValueError, match=r"another rank has it, .* must be a folder that all machines share"):
        map_new_rows(tmp_path / "store" / "a.partial", FORM_OF_ONE)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data.feature_cache.test_reader import FORM_OF_ONE
from vlm.data.feature_cache.store import create_pack
with create_pack(Path(sys.argv[1]), "a", 10, FORM_OF_ONE, None, []) as folder:
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_what_a_killed_run_leaves_is_not_read_and_goes(tmp_path: Path):
    """While it lives, it is left alone."""
    store = tmp_path / "store"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(store)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    begun = Path(process.stdout.readline().strip())
    remove_stale_packs(tmp_path)
    assert begun.is_dir()
    process.kill()
    process.wait()
    assert not open_all_packs(store)
    for _ in range(50):
        remove_stale_packs(tmp_path)
        if not begun.exists():
            break
        time.sleep(0.1)
    assert not begun.exists()
    assert len(made(store, "a", 1.0)) == 1
