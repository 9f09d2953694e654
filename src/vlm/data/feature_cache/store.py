"""Features on disk, in files that are read through memory maps: of images, and of records for prediction heads.

A root holds the stores of all computations of a kind; a store is a folder with packs, each a folder with the features
of some items, found by key. A pack is written under another name and renamed, and renamed again before it is removed,
so that a run which is killed leaves nothing half done; packs are renamed under the root's lock. Whoever reads a pack
holds a shared lock on it, so that none in use is removed to make room.
"""

import fcntl
import json
import math
import mmap
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, Literal, TypeVar
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from vlm.data.skipped import Skipped

FEATURES_FILE, INDEX_FILE, FORMAT_FILE, LOCK_FILE = "features.bin", "index.npz", "format.json", "used"
"""The files of a pack: rows, where each item's are, what all rows are; the last is locked, and dates the last use."""

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a pack that is being written or removed."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class FeatureFormat:
    """What the rows of a pack are.

    Attributes:
        dtype: the name of their type in torch.
        tokens: features of a row, P.
        width: of each feature, V.
        stride: bytes from one row to the next in the file.
    """

    dtype: str
    tokens: int
    width: int
    stride: int

    @classmethod
    def page_aligned(cls, features: Tensor) -> "FeatureFormat":
        """Return the format of features `(rows, P, V)`, each row in pages of its own.

        Of a page that two machines write to, NFS keeps what the later one has.
        """
        tokens, width = features.shape[1:]
        pages = -(-tokens * width * features.dtype.itemsize // mmap.PAGESIZE)
        return cls(str(features.dtype).removeprefix("torch."), tokens, width, pages * mmap.PAGESIZE)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the features."""
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of one row's features."""
        return self.tokens * self.width * self.torch_dtype.itemsize

    def map_rows(self, folder: Path, mode: Literal["r", "r+"]) -> np.ndarray:
        """Return the rows of a pack as a memory map: `(rows, bytes)`."""
        return np.memmap(folder / FEATURES_FILE, np.uint8, mode).reshape(-1, self.stride)[:, : self.nbytes]


class Pack:
    """Features of some items, open to be read, and locked until it is closed or nothing refers to it.

    Args:
        folder: a whole pack.

    Attributes:
        keys: `(items, 2)`: the two halves of each item's key, sorted.
        starts: `(items,)`: the first row of each item.
        counts: `(items,)`: how many rows it has.
        details: `(items, K)`: whole numbers that describe it, see what wrote the pack.
        skipped: items that have no features, and why.
        rows: `(rows, bytes)`: a memory map, once something was read.
        close: releases the lock, so that whoever makes room may remove the pack.

    Raises:
        FileNotFoundError: the pack is not there, or not any more.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.close = weakref.finalize(self, os.close, _lock_pack(folder, fcntl.LOCK_SH))
        try:
            header = json.loads((folder / FORMAT_FILE).read_text(encoding="utf-8"))
            with np.load(folder / INDEX_FILE) as index:
                self.keys, self.starts, self.counts = index["keys"], index["starts"], index["counts"]
                self.details: np.ndarray = index["details"]
        except FileNotFoundError:
            self.close()
            raise
        self.format = FeatureFormat(**header["format"])
        self.skipped = {int(item): Skipped(**record) for item, record in header["skipped"].items()}
        self.rows: np.ndarray | None = None

    def __getstate__(self) -> dict[str, object]:
        """A process that gets a copy maps the rows itself; the lock stays with this process, which outlives it."""
        return {**self.__dict__, "rows": None, "close": None}

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.keys)

    def touch(self) -> None:
        """Note that the pack is used now: the one that was not used for longest is removed first."""
        os.utime(self.folder / LOCK_FILE)

    def find(self, key: bytes) -> int | None:
        """Return the index of an item; None: it is not in this pack."""
        high, low = np.frombuffer(key, np.uint64)
        first, end = (int(np.searchsorted(self.keys[:, 0], high, side)) for side in ("left", "right"))
        item = first + int(np.searchsorted(self.keys[first:end, 1], low))
        return item if item < end and self.keys[item, 1] == low else None

    def read(self, item: int) -> Tensor:
        """Return the features of an item: `(its rows, P, V)`."""
        if self.rows is None:
            self.rows = self.format.map_rows(self.folder, "r")
        start = self.starts[item]
        values = torch.from_numpy(np.array(self.rows[start : start + self.counts[item]]))
        return values.view(self.format.torch_dtype).view(-1, self.format.tokens, self.format.width)


@dataclass
class PackPlan(Generic[Item]):
    """A pack that is to be written; its columns are those of `Pack`.

    Attributes:
        name: of its folder in the store.
        format: of its rows.
        items: what features are computed of.
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
    """A folder of packs, next to the stores of other computations in a root that is bounded as a whole.

    Attributes:
        folder: the store; its parent is the root.
        limit_gb: most that all packs of the root may take, in 10^9 bytes; None: half of what they and the free disk
            are; infinite: the disk alone bounds them, and nothing is removed to make room.
        content: what the packs hold, for the refusal if there is no room.
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

    def open_packs(self) -> list[Pack]:
        """Return the packs that are complete."""
        packs = []
        for file in sorted(self.folder.glob(f"*/{FORMAT_FILE}")):
            if not file.parent.name.endswith(PARTIAL_SUFFIX):
                with suppress(FileNotFoundError):
                    packs.append(Pack(file.parent))
        return packs

    @contextmanager
    def create_pack(self, plan: PackPlan[Item]) -> Iterator[Path]:
        """Yield a folder to write a pack into, its space reserved, and remove it where this ends in an error.

        Raises:
            ValueError: there is no room for it.
        """
        folder = self.folder / f"{plan.name}{PARTIAL_SUFFIX}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock():
            self.make_room(plan.nbytes)
            folder.mkdir()
            lock = _lock_pack(folder, fcntl.LOCK_SH, create=True)
            try:
                with (folder / FEATURES_FILE).open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, plan.nbytes)
            except BaseException:
                _remove_pack(folder, lock)
                raise
        try:
            yield folder
        except BaseException:
            with self.lock(), suppress(OSError):  # the next run removes what stays
                _remove_pack(folder, lock)
            raise
        os.close(lock)

    def finalize_pack(self, plan: PackPlan[Item]) -> Path:
        """Write the index of a pack whose rows are all there; return the folder of the complete pack."""
        folder = self.folder / f"{plan.name}{PARTIAL_SUFFIX}"
        order = np.lexsort((plan.keys[:, 1], plan.keys[:, 0]))
        keys, starts, counts = plan.keys[order], plan.starts[order], plan.counts[order]
        np.savez(folder / INDEX_FILE, keys=keys, starts=starts, counts=counts, details=plan.details[order])
        sorted_items = {int(item): index for index, item in enumerate(order)}
        skipped = {sorted_items[item]: asdict(record) for item, record in plan.skipped.items()}
        header = {"format": asdict(plan.format), "skipped": skipped}
        (folder / FORMAT_FILE).write_text(json.dumps(header), encoding="utf-8")
        for name in (FEATURES_FILE, INDEX_FILE, FORMAT_FILE):
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        with self.lock():
            return folder.rename(self.folder / plan.name)

    def make_room(self, num_bytes: int) -> None:
        """Remove stale packs, then those not used for longest, until so many bytes fit; called under the root's lock.

        Raises:
            ValueError: they do not fit; no whole pack was removed then.
        """
        remove_stale_packs(self.root)
        packs: list[tuple[float, int, Path]] = []
        for file in self.root.glob(f"*/*/{FEATURES_FILE}"):  # also of packs that are being written
            with suppress(FileNotFoundError):
                last_used = (file.parent / LOCK_FILE).stat().st_mtime
                packs.append((last_used, file.stat().st_size, file.parent))
        free, held = shutil.disk_usage(self.root).free, sum(size for _, size, _ in packs)
        limit = (free + held) / 2 if self.limit_gb is None else self.limit_gb * 1e9
        lacking = max(held + num_bytes - limit, num_bytes - free)
        chosen = []
        removable = [pack for pack in sorted(packs) if limit < math.inf and not pack[2].name.endswith(PARTIAL_SUFFIX)]
        for _, size, folder in removable:
            if lacking > 0 and (lock := _try_exclusive_lock(folder)) is not None:
                chosen.append((folder, lock))
                lacking -= size
        for folder, lock in chosen:
            if lacking <= 0:
                _remove_pack(folder, lock)
            else:
                os.close(lock)
        if lacking > 0:
            reason = "half of what it and the free disk are"
            if self.limit_gb is not None:
                reason = f"dataset.cache_limit_gb={self.limit_gb:g}"
            allowed = f"; {limit / 1e9:.3g} GB are allowed ({reason})" if limit < math.inf else ""
            raise ValueError(
                f"{self.content} need {num_bytes / 1e9:.3g} GB more in {self.root}, where {held / 1e9:.3g} GB are in "
                f"use{allowed} and {free / 1e9:.3g} GB free. {self.advice}"
            )


def remove_stale_packs(root: Path) -> None:
    """Remove what runs that were killed have left, and packs that lack a file; called under the root's lock."""
    for folder in root.glob("*/*"):
        is_whole = all((folder / name).is_file() for name in (FEATURES_FILE, INDEX_FILE, FORMAT_FILE, LOCK_FILE))
        if folder.name.endswith(PARTIAL_SUFFIX) or (folder.is_dir() and not is_whole):
            with suppress(OSError):  # the next run tries again
                if not (folder / LOCK_FILE).is_file():
                    shutil.rmtree(folder)
                elif (lock := _try_exclusive_lock(folder)) is not None:
                    _remove_pack(folder, lock)


def _lock_pack(folder: Path, operation: int, *, create: bool = False) -> int:
    """Lock a pack, see `flock`: for as long as this process, or one forked from it, has the returned descriptor open.

    Raises:
        FileNotFoundError: the pack is not there.
        BlockingIOError: another process has locked it, and `operation` does not wait.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | (os.O_CREAT if create else 0))
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _try_exclusive_lock(folder: Path) -> int | None:
    """Lock a pack exclusively; return None if it is in use or has just been removed."""
    with suppress(FileNotFoundError, BlockingIOError):
        return _lock_pack(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return None


def _remove_pack(folder: Path, lock: int) -> None:
    """Remove a folder that is held alone; called under the root's lock. `remove_stale_packs` finishes it if stopped."""
    renamed = folder.with_name(f"{folder.name}.{uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        folder.rename(renamed)
    finally:
        os.close(lock)  # first: of a file that is open NFS leaves something, and so its folder
    shutil.rmtree(renamed)
