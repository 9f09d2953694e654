"""Packs of features: read by key, written whole or not at all, removed where nobody reads them."""

import math
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from tests.waiting import wait_until
from vlm.data.feature_cache import store as feature_store
from vlm.data.feature_cache.store import (
    FEATURES_FILE,
    FORMAT_FILE,
    INDEX_FILE,
    LOCK_FILE,
    FeatureFormat,
    FeatureStore,
    Pack,
    PackPlan,
    remove_stale_packs,
)
from vlm.data.skipped import Skipped

ROW_FORMAT = FeatureFormat("bfloat16", 2, 3, stride=20)
"""Rows that do not touch: 12 bytes, 20 apart."""


def make_plan(name: str, *values: float, row_format: FeatureFormat = ROW_FORMAT) -> PackPlan[float]:
    """A plan for a pack with an item of one row for each of these numbers."""
    ones = np.ones(len(values), dtype=np.int64)
    keys = np.array([[7, int(value * 8)] for value in values], dtype=np.uint64)  # the first halves are all alike
    return PackPlan(name, row_format, list(values), keys, ones, np.zeros((len(values), 0), dtype=np.int64), {})


def make_pack(folder: Path, name: str, *values: float, limit: float | None = None) -> Pack:
    """Write a pack whose rows are filled with these numbers."""
    store, plan = FeatureStore(folder, limit), make_plan(name, *values)
    with store.create_pack(plan) as partial:
        rows = ROW_FORMAT.map_rows(partial, "r+")
        for row, value in enumerate(values):
            rows[row] = torch.full((6,), value, dtype=torch.bfloat16).view(torch.uint8).numpy()
        return Pack(store.finalize_pack(plan))


def make_room(folder: Path, num_bytes: int, limit: float | None) -> None:
    FeatureStore(folder, limit).make_room(num_bytes)


def make_key(value: float) -> bytes:
    return make_plan("", value).keys.tobytes()


def test_a_pack_is_read_by_key(tmp_path: Path):
    pack = make_pack(tmp_path / "store", "a", 3.0, 1.0, 2.0)
    for value in (1.0, 2.0, 3.0):
        item = pack.find(make_key(value))
        assert item is not None
        assert torch.equal(pack.read(item), torch.full((1, 2, 3), value, dtype=torch.bfloat16))
    assert pack.find(make_key(4.0)) is None
    assert pack.find(bytes(16)) is None


def test_items_have_as_many_rows_as_planned_and_their_own_details(tmp_path: Path):
    """Keys are sorted, rows are not; of an item that is skipped the reason is kept."""
    store = FeatureStore(tmp_path / "store", None)
    keys = np.array([[2, 0], [1, 5], [1, 4]], dtype=np.uint64)
    details = np.array([[20], [15], [14]])
    record = Skipped(3, "c", "it does not open", "c.png", "records.json")
    row_format = FeatureFormat("float32", 1, 1, stride=4)
    plan = PackPlan("a", row_format, ["x", "y", "z"], keys, np.array([1, 3, 2]), details, {2: record})
    with store.create_pack(plan) as partial:
        row_format.map_rows(partial, "r+")[:] = torch.arange(6.0).view(torch.uint8).view(6, 4).numpy()
        pack = Pack(store.finalize_pack(plan))
    assert [pack.find(key.tobytes()) for key in keys] == [2, 1, 0]
    assert [pack.read(item).flatten().tolist() for item in range(3)] == [[4.0, 5.0], [1.0, 2.0, 3.0], [0.0]]
    assert pack.details.tolist() == [[14], [15], [20]]
    assert pack.skipped == {0: record}


def test_what_was_not_used_for_longest_makes_room_and_what_is_read_stays(tmp_path: Path):
    store = tmp_path / "store"
    packs_ = {name: make_pack(store, name, *range(10)) for name in ("a", "b", "c")}
    for age, name in enumerate(("b", "a", "c")):
        os.utime(store / name / "used", (age, age))
    packs_["a"].close()
    packs_["b"].close()
    make_pack(store, "d", *range(10), limit=600e-9).close()
    assert {pack.folder.name for pack in FeatureStore(store, None).open_packs()} == {"a", "c", "d"}, (
        "the oldest goes, and no more than that"
    )
    packs_["c"].touch()
    with pytest.raises(ValueError, match=r"need 5e-07 GB more in .*, where 6e-07 GB are in use; 6e-07 GB are allowed"):
        make_room(store, 500, 600e-9)
    assert {pack.folder.name for pack in FeatureStore(store, None).open_packs()} == {"a", "c", "d"}, (
        "nothing goes where that is not enough"
    )
    assert torch.equal(packs_["c"].read(1), torch.ones(1, 2, 3, dtype=torch.bfloat16))


def test_an_unbounded_store_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk alone bounds it."""
    make_pack(tmp_path / "store", "a", 1.0, limit=math.inf).close()
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda folder: usage)
    make_room(tmp_path / "store", 100, math.inf)
    with pytest.raises(ValueError, match=r"need 1.01e-07 GB more in .*, where 2e-08 GB are in use and 1e-07 GB free"):
        make_room(tmp_path / "store", 101, math.inf)
    assert (tmp_path / "store" / "a").is_dir()


def test_a_view_takes_whole_pages_of_its_file(tmp_path: Path):
    """Machines that share the folder over NFS write whole pages, and must not write each other's."""
    features = torch.arange(24.0).view(2, 4, 3)
    row_format = FeatureFormat.page_aligned(features)
    assert (row_format.nbytes, row_format.stride) == (48, mmap.PAGESIZE)
    pages = -(-197 * 768 * 4 // mmap.PAGESIZE)
    assert FeatureFormat.page_aligned(torch.zeros(1, 197, 768)).stride == pages * mmap.PAGESIZE
    store, plan = FeatureStore(tmp_path / "store", None), make_plan("a", 0, 1, row_format=row_format)
    with store.create_pack(plan) as folder:
        row_format.map_rows(folder, "r+")[:] = features.view(torch.uint8).flatten(1).numpy()
        assert (folder / FEATURES_FILE).stat().st_size == 2 * mmap.PAGESIZE
        pack = Pack(store.finalize_pack(plan))
    assert torch.equal(torch.cat([pack.read(0), pack.read(1)]), features)


def test_a_pack_that_nothing_refers_to_makes_room(tmp_path: Path):
    pack = make_pack(tmp_path / "store", "a", 1.0)
    with pytest.raises(ValueError, match="need 2e-08 GB more"):
        make_room(tmp_path / "store", 20, 30e-9)
    del pack
    make_room(tmp_path / "store", 20, 30e-9)
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.parametrize("missing", [[], [FEATURES_FILE], [FORMAT_FILE], [INDEX_FILE, FORMAT_FILE], [LOCK_FILE]])
def test_what_is_left_of_a_removal_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]):
    """A process ended while it removed a pack; then one of the same name is made."""
    store = tmp_path / "store"
    make_pack(store, "a", 1.0).close()

    def stops(folder: Path) -> None:
        for name in missing:
            (folder / name).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(feature_store.shutil, "rmtree", stops)
        with pytest.raises(KeyboardInterrupt):
            make_room(tmp_path / "store", 20, 30e-9)
    assert not FeatureStore(store, None).open_packs()
    assert len(make_pack(store, "a", 1.0)) == 1
    assert [one.name for one in store.iterdir()] == ["a"]


@pytest.mark.parametrize("missing", [FEATURES_FILE, INDEX_FILE, FORMAT_FILE, LOCK_FILE])
def test_a_pack_that_lacks_a_file_is_made_again(tmp_path: Path, missing: str):
    store = tmp_path / "store"
    make_pack(store, "a", 1.0).close()
    (store / "a" / missing).unlink()
    with make_pack(store, "a", 1.0).folder.joinpath(missing).open("rb"):
        assert [one.name for one in store.iterdir()] == ["a"]


def test_a_pack_counts_once_while_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another run looks for room when all its files are written."""
    original = Path.rename
    refusals = []

    def looked(self: Path, target: Path) -> Path:
        with pytest.raises(ValueError, match="GB more") as refusal:
            make_room(tmp_path / "store", 100, 50e-9)
        refusals.append(str(refusal.value))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", looked)
    assert len(make_pack(tmp_path / "store", "a", 1.0, 2.0)) == 2
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
        lambda: FeatureStore(store, None).open_packs(),
        lambda: make_room(tmp_path / "store", 20, 30e-9),
        lambda: remove_stale_packs(tmp_path),
    ):
        make_pack(store, "a", 1.0).close()
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
    make_pack(tmp_path / "store", "a", 1.0).close()
    make_pack(tmp_path / "store", "b", 1.0, limit=30e-9).close()
    with pytest.raises(KeyboardInterrupt), FeatureStore(tmp_path / "store", None).create_pack(make_plan("c", 1.0)):
        raise KeyboardInterrupt
    assert len(held) == 2 + 2 + 2
    assert all(held)
    assert [one.name for one in (tmp_path / "store").iterdir()] == ["b"]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data.feature_cache.test_store import make_plan
from vlm.data.feature_cache.store import FeatureStore
with FeatureStore(Path(sys.argv[1]), None).create_pack(make_plan("a", *range(10))) as folder:
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
    assert not FeatureStore(store, None).open_packs()
    wait_until(lambda: remove_stale_packs(tmp_path) or not begun.exists())
    assert len(make_pack(store, "a", 1.0)) == 1
