"""Where packs of features are written and removed: bounded, each whole or not there.

The root holds the stores of all encoders. A pack is written under another name and renamed, and renamed again before it
is removed, so that a run which is killed leaves nothing half done; whatever gets another name does so under the root's
lock. Imports `data/feature_files.py` alone.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import numpy as np
from filelock import FileLock

from vlm.data.feature_cache.reader import (
    FEATURES_FILE,
    FORMAT_FILE,
    INDEX_FILE,
    LOCK_FILE,
    PARTIAL_SUFFIX,
    FeatureFormat,
    Pack,
    acquire_shared_lock,
    last_used,
    map_feature_rows,
    not_shared_error,
)


@contextmanager
def create_pack(
    store: Path, name: str, rows: int, form: FeatureFormat, limit_gb: float | None, keep_packs: Sequence[Pack]
) -> Iterator[Path]:
    """A folder to write a pack into, its space reserved; what is in it when this ends in an error goes.

    Args:
        store: where.
        name: of the pack.
        rows: views that it holds.
        form: what each is.
        limit_gb: see `make_room`.
        keep_packs: packs that this run reads too.

    Raises:
        ValueError: there is no room for it.
    """
    folder = store / f"{name}{PARTIAL_SUFFIX}"
    store.mkdir(parents=True, exist_ok=True)
    with store_lock(store.parent):
        remove_stale_packs(store.parent)
        make_room(store.parent, rows * form.stride, limit_gb, keep_packs)
        lock = _reserve_folder(folder, rows * form.stride)
    try:
        yield folder
    except BaseException:
        with store_lock(store.parent), suppress(OSError):  # what stays is swept
            _remove_pack(folder, lock)
        raise
    os.close(lock)


def _reserve_folder(folder: Path, nbytes: int) -> int:
    """Make a folder for a pack with rows of so many bytes, and hold it."""
    folder.mkdir()
    lock = acquire_shared_lock(folder, create=True)
    try:
        with (folder / FEATURES_FILE).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
    except BaseException:
        _remove_pack(folder, lock)
        raise
    return lock


def make_room_for_packs(root: Path, num_bytes: int, limit_gb: float | None, keep_packs: Sequence[Pack]) -> None:
    """`make_room`, for several packs before the first."""
    root.mkdir(parents=True, exist_ok=True)
    with store_lock(root):
        remove_stale_packs(root)
        make_room(root, num_bytes, limit_gb, keep_packs)


def store_lock(root: Path) -> FileLock:
    """What is held while packs in a root get another name or go."""
    return FileLock(root / "lock")


def map_new_rows(folder: Path, form: FeatureFormat) -> np.ndarray:
    """The rows of a pack that is being written: `(views, bytes)`.

    Raises:
        ValueError: another rank has made it, and it is not here.
    """
    file = folder / FEATURES_FILE
    if not file.is_file():
        raise not_shared_error(file)
    return map_feature_rows(file, form, "r+")


def finalize_pack(
    folder: Path, form: FeatureFormat, keys: Sequence[bytes], starts: np.ndarray, views: np.ndarray, sizes: np.ndarray,
    problems: Mapping[int, tuple[str, str | None]],
) -> None:  # fmt: skip
    """Write the index of a pack whose rows are all there: it is whole from then on."""
    table = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
    order = np.lexsort((table[:, 1], table[:, 0]))
    np.savez(folder / INDEX_FILE, keys=table[order], starts=starts[order], views=views[order], sizes=sizes[order])
    place = {int(old): new for new, old in enumerate(order)}
    facts = {"form": asdict(form), "problems": {place[old]: problem for old, problem in problems.items()}}
    (folder / FORMAT_FILE).write_text(json.dumps(facts), encoding="utf-8")
    for name in (FEATURES_FILE, INDEX_FILE, FORMAT_FILE):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    with store_lock(folder.parent.parent):
        folder.rename(folder.with_name(folder.name.removesuffix(PARTIAL_SUFFIX)))


def make_room(root: Path, num_bytes: int, limit_gb: float | None, keep_packs: Sequence[Pack]) -> None:
    """Remove the packs that no run has used for longest, until so many bytes fit; called under the root's lock.

    Args:
        root: the folder of all stores.
        num_bytes: bytes of what is to come.
        limit_gb: most that all packs may take, in 10^9 bytes; None: half of what they and the free disk are.
        keep_packs: packs that stay, whatever.

    Raises:
        ValueError: it does not fit; nothing was removed then.
    """
    sizes = {
        rows.parent: _file_size(rows) for rows in root.glob(f"*/*/{FEATURES_FILE}")
    }  # of what is being written too
    free, held = shutil.disk_usage(root).free, sum(sizes.values())
    limit = (free + held) / 2 if limit_gb is None else limit_gb * 1e9
    own = {pack.folder for pack in keep_packs}
    oldest = sorted((one for one in sizes if one not in own and not one.name.endswith(PARTIAL_SUFFIX)), key=last_used)
    lacking = max(held + num_bytes - limit, num_bytes - free)
    going = []
    for folder in oldest:
        if lacking <= 0:
            break
        if (lock := _try_exclusive_lock(folder)) is not None:
            going.append((folder, lock))
            lacking -= sizes[folder]
    for folder, lock in going:
        if lacking <= 0:
            _remove_pack(folder, lock)
        else:
            os.close(lock)
    if lacking > 0:
        bound = "half of what it and the free disk are" if limit_gb is None else f"dataset.cache_limit_gb={limit_gb:g}"
        raise ValueError(
            f"dataset.cache_features=true: features of the pictures need {num_bytes / 1e9:.3g} GB more in {root}, where "
            f"{held / 1e9:.3g} GB are in use; {limit / 1e9:.3g} GB are allowed ({bound}) and {free / 1e9:.3g} GB free. "
            "Raise dataset.cache_limit_gb, set dataset.cache_dir to another disk, take fewer records "
            "(dataset.max_samples), or leave out dataset.cache_features"
        )


def remove_stale_packs(root: Path) -> None:
    """Remove what runs that were killed have left, and packs that lack a file; called under the root's lock."""
    for folder in root.glob("*/*"):
        if folder.name.endswith(PARTIAL_SUFFIX) or (folder.is_dir() and not _is_complete(folder)):
            with suppress(OSError):  # what stays, the next run tries again
                if not (folder / LOCK_FILE).is_file():
                    shutil.rmtree(folder)
                elif (lock := _try_exclusive_lock(folder)) is not None:
                    _remove_pack(folder, lock)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (FEATURES_FILE, INDEX_FILE, FORMAT_FILE, LOCK_FILE))


def _file_size(file: Path) -> int:
    """Bytes of a file; of one that has just gone none."""
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def _remove_pack(folder: Path, lock: int) -> None:
    """Remove a folder that is held alone; called under the root's lock. Stopped half-way, the rest is swept."""
    gone = folder.with_name(f"{folder.name}.{uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        folder.rename(gone)
    finally:
        os.close(lock)  # before it goes: of a file that is open NFS leaves something, and so its folder
    shutil.rmtree(gone)


def _try_exclusive_lock(folder: Path) -> int | None:
    """Hold a pack alone; None: somebody uses it, or it has just gone."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
