"""Features on disk, in files that are read through memory maps: of images, and of records for prediction heads.

A store is a folder for all that one computation gives; in it, a pack is a folder with the features of some items, found
by key. Whoever reads a pack holds a shared lock on it, so that `store.py`, which writes packs, removes none in use.
"""

import fcntl
import json
import mmap
import os
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlm.data.dataset import Skipped

FEATURES_FILE, INDEX_FILE, FORMAT_FILE, LOCK_FILE = "features.bin", "index.npz", "format.json", "used"
"""The files of a pack: rows, where each item's are, what all rows are; the last is locked, and dates the last use."""

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a pack that is being written or removed."""


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
        """Return the rows of a pack as a memory map: `(rows, bytes)`.

        Raises:
            ValueError: another rank made the pack, and this one does not see it.
        """
        file = folder / FEATURES_FILE
        if not file.is_file():
            raise not_shared_error(file)
        return np.memmap(file, np.uint8, mode).reshape(-1, self.stride)[:, : self.nbytes]


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

    Raises:
        FileNotFoundError: the pack is not there, or not any more.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._release = weakref.finalize(self, os.close, lock_pack(folder, fcntl.LOCK_SH))
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
        return {**self.__dict__, "rows": None, "_release": None}

    def __len__(self) -> int:
        return len(self.keys)

    def close(self) -> None:
        """Release the lock: whoever makes room may remove the pack."""
        self._release()

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


def open_all_packs(store: Path) -> list[Pack]:
    """Return the whole packs of a store, the last used first."""
    packs = []
    for folder in sorted((file.parent for file in store.glob(f"*/{FORMAT_FILE}")), key=last_used, reverse=True):
        if not folder.name.endswith(PARTIAL_SUFFIX):
            with suppress(FileNotFoundError):
                packs.append(Pack(folder))
    return packs


def open_shared_pack(folder: Path) -> Pack:
    """Open a pack that another rank has.

    Raises:
        ValueError: this rank does not see it.
    """
    try:
        return Pack(folder)
    except FileNotFoundError as error:
        raise not_shared_error(folder) from error


def not_shared_error(path: Path) -> ValueError:
    """Return the error for a path that another rank has made and this one does not see."""
    return ValueError(
        f"{path}: another rank has it, and it is not here; dataset.cache_dir must be a folder that all machines share, "
        "or set dataset.cache_features=false"
    )


def last_used(folder: Path) -> float:
    """Return when a pack was last used, in seconds."""
    try:
        return (folder / LOCK_FILE).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def lock_pack(folder: Path, operation: int, *, create: bool = False) -> int:
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
