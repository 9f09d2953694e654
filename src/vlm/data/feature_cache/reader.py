"""What a frozen visual encoder gives for pictures, in files that are read through memory maps.

A store is a folder for one encoder; in it, a pack is a folder of features of some pictures, found by their keys.
Whoever reads a pack holds a shared lock on it, so that nobody removes it to make room: `feature_store.py` does, and
writes packs. Imports nothing of `vlm`.
"""

import fcntl
import json
import mmap
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

FEATURES_FILE, INDEX_FILE, FORMAT_FILE, LOCK_FILE = "features.bin", "index.npz", "form.json", "used"
"""The files of a pack: features, where each picture's are, what all are; the last is locked, and dates its last use."""

PARTIAL_SUFFIX = ".partial"
"""How the name of a pack ends that is not whole, not yet or not any more."""


@dataclass(frozen=True)
class FeatureFormat:
    """What the features of one view are.

    Attributes:
        dtype: the name of their type in torch: what training computes them in.
        tokens: features of a view, P.
        width: of each, V.
        stride: bytes from one view to the next in a file.
    """

    dtype: str
    tokens: int
    width: int
    stride: int

    @classmethod
    def of(cls, features: Tensor) -> "FeatureFormat":
        """That of features `(views, P, V)`.

        In a file a view takes whole pages: of one that two machines write to, NFS keeps what the later one has.
        """
        tokens, width = features.shape[1:]
        pages = -(-tokens * width * features.dtype.itemsize // mmap.PAGESIZE)
        return cls(str(features.dtype).removeprefix("torch."), tokens, width, pages * mmap.PAGESIZE)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Their type."""
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of one view's features."""
        return self.tokens * self.width * self.torch_dtype.itemsize


@dataclass(frozen=True)
class CachedImage:
    """One picture in a pack.

    Attributes:
        pack: the number of the pack in its store.
        start: its first view there.
        views: how many it has, as `AnyRes.num_views` counts them.
        size: its height and width in pixels.
        problem: why it does not open, and its file; None: it does.
    """

    pack: int
    start: int
    views: int
    size: tuple[int, int]
    problem: tuple[str, str | None] | None = None


class Pack:
    """Features of some pictures, open to be read, and locked until it is closed or nothing refers to it.

    Args:
        folder: where it is; whole.

    Raises:
        FileNotFoundError: it is not, or not any more.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._release = weakref.finalize(self, os.close, acquire_shared_lock(folder))
        if not (folder / FORMAT_FILE).is_file():
            self.close()
            raise FileNotFoundError(folder / FORMAT_FILE)
        facts = json.loads((folder / FORMAT_FILE).read_text(encoding="utf-8"))
        self.form = FeatureFormat(**facts["form"])
        self.problems = {int(place): tuple(problem) for place, problem in facts["problems"].items()}
        with np.load(folder / INDEX_FILE) as index:
            self.keys, self.starts, self.views, self.sizes = (index[n] for n in ("keys", "starts", "views", "sizes"))
        self._rows: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A process that gets a copy opens the rows itself; the lock stays with this one, which outlives it."""
        return {**self.__dict__, "_rows": None, "_release": None}

    def __len__(self) -> int:
        return len(self.keys)

    def close(self) -> None:
        """Let go of it: whoever makes room may remove it."""
        self._release()

    def touch(self) -> None:
        """Note that it is used now: what was not for longest goes first."""
        os.utime(self.folder / LOCK_FILE)

    def place(self, key: bytes) -> int | None:
        """Where a picture stands in the index; None: it is not here."""
        high, low = np.frombuffer(key, np.uint64)
        place = int(np.searchsorted(self.keys[:, 0], high))
        while place < len(self.keys) and self.keys[place, 0] == high:
            if self.keys[place, 1] == low:
                return place
            place += 1
        return None

    def read(self, start: int, number: int) -> Tensor:
        """Features of some views: `(number, P, V)`."""
        if self._rows is None:
            self._rows = map_feature_rows(self.folder / FEATURES_FILE, self.form, "r")
        found = torch.from_numpy(np.array(self._rows[start : start + number])).view(self.form.torch_dtype)
        return found.view(number, self.form.tokens, self.form.width)


class ImageFeatures:
    """Features of the pictures of a run, out of several packs.

    Args:
        packs: open.
    """

    def __init__(self, packs: Sequence[Pack]):
        self.packs = list(packs)

    def find(self, key: bytes) -> CachedImage | None:
        """A picture by its key; None: it is in no pack."""
        for number, pack in enumerate(self.packs):
            if (place := pack.place(key)) is not None:
                height, width = pack.sizes[place].tolist()
                problem = pack.problems.get(place)
                return CachedImage(number, int(pack.starts[place]), int(pack.views[place]), (height, width), problem)
        return None

    def read(self, seen: CachedImage) -> Tensor:
        """The features of a picture's views: `(views, P, V)`; a frame has one."""
        return self.packs[seen.pack].read(seen.start, max(seen.views, 1))


def open_all_packs(store: Path) -> list[Pack]:
    """The whole packs of a store, the newest first."""
    found = []
    for folder in sorted((form.parent for form in store.glob(f"*/{FORMAT_FILE}")), key=last_used, reverse=True):
        if not folder.name.endswith(PARTIAL_SUFFIX):
            with suppress(FileNotFoundError):
                found.append(Pack(folder))
    return found


def open_shared_pack(folder: Path) -> Pack:
    """A pack that another rank has, open.

    Raises:
        ValueError: it is not here.
    """
    try:
        return Pack(folder)
    except FileNotFoundError as error:
        raise not_shared_error(folder) from error


def not_shared_error(path: Path) -> ValueError:
    """What to say where something of another rank's is not here."""
    return ValueError(
        f"{path}: another rank has it, and it is not here; dataset.cache_dir must be a folder that all machines share, "
        "or leave out dataset.cache_features"
    )


def map_feature_rows(file: Path, form: FeatureFormat, mode: Literal["r", "r+"]) -> np.ndarray:
    """The features in a file as a memory map: `(views, bytes)`."""
    return np.memmap(file, np.uint8, mode).reshape(-1, form.stride)[:, : form.nbytes]


def last_used(folder: Path) -> float:
    """When a pack was last used, in seconds."""
    try:
        return (folder / LOCK_FILE).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def acquire_shared_lock(folder: Path, *, create: bool = False) -> int:
    """Hold a pack: nobody removes it while this, or a process forked from it, has the descriptor open."""
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | (os.O_CREAT if create else 0))
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock
