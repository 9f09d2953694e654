"""Where packs of features are written and removed: bounded, each whole or not there.

A root holds the stores of all computations of a kind. A pack is written under another name and renamed, and renamed
again before it is removed, so that a run which is killed leaves nothing half done; packs are renamed under the root's
lock.
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar
from uuid import uuid4

import numpy as np
from filelock import FileLock

from vlm.data.dataset import Skipped
from vlm.data.feature_cache.reader import (
    FEATURES_FILE,
    FORMAT_FILE,
    INDEX_FILE,
    LOCK_FILE,
    PARTIAL_SUFFIX,
    FeatureFormat,
    last_used,
    lock_pack,
)

Item = TypeVar("Item")


@dataclass
class PackPlan(Generic[Item]):
    """A pack that is to be written.

    Attributes:
        name: of its folder in the store.
        format: of its rows.
        items: what features are computed of.
        keys: `(items, 2)`: the two halves of each item's key.
        counts: `(items,)`: how many rows each has.
        details: `(items, K)`: whole numbers that describe it.
        skipped: items that have no features, and why.
    """

    name: str
    format: FeatureFormat
    items: list[Item]
    keys: np.ndarray
    counts: np.ndarray
    details: np.ndarray
    skipped: dict[int, Skipped]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each item: `(items,)`."""
        return self.counts.cumsum() - self.counts

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(self.counts.sum()) * self.format.stride


@dataclass(frozen=True)
class FeatureStore:
    """A folder of packs, beside the stores of other computations in a root that is bounded as a whole.

    Attributes:
        folder: the store; its parent is the root.
        limit_gb: most that all packs of the root may take, in 10^9 bytes; None: half of what they and the free disk
            are; infinite: the disk alone bounds them, and nothing is removed to make room.
        content: what the packs hold, for the refusal where there is no room.
        advice: what the user can do then.
    """

    folder: Path
    limit_gb: float | None
    content: str = "features"
    advice: str = "Raise dataset.cache_limit_gb"

    @property
    def root(self) -> Path:
        """The folder of all stores of a kind."""
        return self.folder.parent

    def lock(self) -> FileLock:
        """Return the lock that is held while packs of the root are renamed or removed."""
        return FileLock(self.root / "lock")

    def reserve(self, num_bytes: int) -> None:
        """Make room for several packs before the first is written.

        Raises:
            ValueError: there is none.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with self.lock():
            remove_stale_packs(self.root)
            self.make_room(num_bytes)

    @contextmanager
    def create_pack(self, plan: PackPlan[Item]) -> Iterator[Path]:
        """Yield a folder to write a pack into, its space reserved, and remove it where this ends in an error.

        Raises:
            ValueError: there is no room for it.
        """
        folder = self.folder / f"{plan.name}{PARTIAL_SUFFIX}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock():
            remove_stale_packs(self.root)
            self.make_room(plan.nbytes)
            lock = _reserve_folder(folder, plan.nbytes)
        try:
            yield folder
        except BaseException:
            with self.lock(), suppress(OSError):  # the next run removes what stays
                _remove_pack(folder, lock)
            raise
        os.close(lock)

    def finalize_pack(self, plan: PackPlan[Item]) -> Path:
        """Write the index of a pack whose rows are all there; return its folder, under which it is whole."""
        folder = self.folder / f"{plan.name}{PARTIAL_SUFFIX}"
        order = np.lexsort((plan.keys[:, 1], plan.keys[:, 0]))
        keys, starts, counts = plan.keys[order], plan.starts[order], plan.counts[order]
        np.savez(folder / INDEX_FILE, keys=keys, starts=starts, counts=counts, details=plan.details[order])
        places = {int(old): new for new, old in enumerate(order)}
        skipped = {places[item]: asdict(record) for item, record in plan.skipped.items()}
        header = {"format": asdict(plan.format), "skipped": skipped}
        (folder / FORMAT_FILE).write_text(json.dumps(header), encoding="utf-8")
        for name in (FEATURES_FILE, INDEX_FILE, FORMAT_FILE):
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        with self.lock():
            return folder.rename(self.folder / plan.name)

    def make_room(self, num_bytes: int) -> None:
        """Remove the packs that no run has used for longest, until so many bytes fit; called under the root's lock.

        Raises:
            ValueError: they do not fit; nothing was removed then.
        """
        sizes = {file.parent: _file_size(file) for file in self.root.glob(f"*/*/{FEATURES_FILE}")}
        free, held = shutil.disk_usage(self.root).free, sum(sizes.values())
        limit = (free + held) / 2 if self.limit_gb is None else self.limit_gb * 1e9
        lacking = max(held + num_bytes - limit, num_bytes - free)
        removable = [] if limit == math.inf else [pack for pack in sizes if not pack.name.endswith(PARTIAL_SUFFIX)]
        chosen = []
        for folder in sorted(removable, key=last_used):
            if lacking <= 0:
                break
            if (lock := _try_exclusive_lock(folder)) is not None:
                chosen.append((folder, lock))
                lacking -= sizes[folder]
        for folder, lock in chosen:
            if lacking <= 0:
                _remove_pack(folder, lock)
            else:
                os.close(lock)
        if lacking > 0:
            raise ValueError(
                f"{self.content} need {num_bytes / 1e9:.3g} GB more in {self.root}, where {held / 1e9:.3g} GB are in "
                f"use{self._describe(limit)} and {free / 1e9:.3g} GB free. {self.advice}"
            )

    def _describe(self, limit: float) -> str:
        """Return how much is allowed and why, as a part of a sentence; `limit` is in bytes."""
        if limit == math.inf:
            return ""
        fixed = f"dataset.cache_limit_gb={self.limit_gb:g}" if self.limit_gb is not None else ""
        return f"; {limit / 1e9:.3g} GB are allowed ({fixed or 'half of what it and the free disk are'})"


def remove_stale_packs(root: Path) -> None:
    """Remove what runs that were killed have left, and packs that lack a file; called under the root's lock."""
    for folder in root.glob("*/*"):
        if folder.name.endswith(PARTIAL_SUFFIX) or (folder.is_dir() and not _is_complete(folder)):
            with suppress(OSError):  # the next run tries again
                if not (folder / LOCK_FILE).is_file():
                    shutil.rmtree(folder)
                elif (lock := _try_exclusive_lock(folder)) is not None:
                    _remove_pack(folder, lock)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (FEATURES_FILE, INDEX_FILE, FORMAT_FILE, LOCK_FILE))


def _reserve_folder(folder: Path, nbytes: int) -> int:
    """Make and lock a folder for a pack with rows of so many bytes."""
    folder.mkdir()
    lock = lock_pack(folder, fcntl.LOCK_SH, create=True)
    try:
        with (folder / FEATURES_FILE).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
    except BaseException:
        _remove_pack(folder, lock)
        raise
    return lock


def _file_size(file: Path) -> int:
    """Return the bytes of a file; none of one that has just gone."""
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def _remove_pack(folder: Path, lock: int) -> None:
    """Remove a folder that is held alone; called under the root's lock. `remove_stale_packs` finishes it if stopped."""
    renamed = folder.with_name(f"{folder.name}.{uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        folder.rename(renamed)
    finally:
        os.close(lock)  # first: of a file that is open NFS leaves something, and so its folder
    shutil.rmtree(renamed)


def _try_exclusive_lock(folder: Path) -> int | None:
    """Hold a pack alone; None: somebody uses it, or it has just gone."""
    with suppress(FileNotFoundError, BlockingIOError):
        return lock_pack(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return None
