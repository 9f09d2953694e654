"""What a frozen visual encoder gives for pictures, in files: read through memory maps, bounded, whole or not there.

A store is a folder for one encoder; in it, a pack is a folder of features of some pictures, found by their keys. A pack
is written under another name and renamed, so that a run which is killed leaves nothing half done; whoever reads it
holds a shared lock on it, so that nobody removes it to make room. Imports nothing of `vlm`.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

ROWS, INDEX, FORM, USED = "features.bin", "index.npz", "form.json", "used"
PARTIAL = ".partial"
"""How the name of a pack ends that is not whole."""


@dataclass(frozen=True)
class Form:
    """What the features of one view are.

    Attributes:
        dtype: the name of their type in torch: what training computes them in.
        tokens: features of a view, P.
        width: of each, V.
    """

    dtype: str
    tokens: int
    width: int

    @classmethod
    def of(cls, features: Tensor) -> "Form":
        """That of features `(views, P, V)`."""
        return cls(str(features.dtype).removeprefix("torch."), *features.shape[1:])

    @property
    def torch_dtype(self) -> torch.dtype:
        """Their type."""
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of one view."""
        return self.tokens * self.width * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Seen:
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
    """Features of some pictures, open to be read.

    Args:
        folder: where it is; whole.

    Raises:
        FileNotFoundError: it is not, or not any more.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = _shared_lock(folder)
        facts = json.loads((folder / FORM).read_text(encoding="utf-8"))
        self.form = Form(**facts["form"])
        self.problems = {int(place): tuple(problem) for place, problem in facts["problems"].items()}
        with np.load(folder / INDEX) as index:
            self.keys, self.starts, self.views, self.sizes = (index[n] for n in ("keys", "starts", "views", "sizes"))
        self._rows: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A process that gets a copy opens the rows itself; the lock stays with this one, which outlives it."""
        return {**self.__dict__, "_rows": None, "_lock": None}

    def __len__(self) -> int:
        return len(self.keys)

    def close(self) -> None:
        """Let go of it: whoever makes room may remove it."""
        os.close(self._lock)

    def touch(self) -> None:
        """Note that it is used now: what was not for longest goes first."""
        os.utime(self.folder / USED)

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
            self._rows = np.memmap(self.folder / ROWS, np.uint8, "r").reshape(-1, self.form.nbytes)
        found = torch.from_numpy(np.array(self._rows[start : start + number])).view(self.form.torch_dtype)
        return found.view(number, self.form.tokens, self.form.width)


class ImageFeatures:
    """Features of the pictures of a run, out of several packs.

    Args:
        packs: open.
    """

    def __init__(self, packs: Sequence[Pack]):
        self.packs = list(packs)

    def find(self, key: bytes) -> Seen | None:
        """A picture by its key; None: it is in no pack."""
        for number, pack in enumerate(self.packs):
            if (place := pack.place(key)) is not None:
                height, width = pack.sizes[place].tolist()
                problem = pack.problems.get(place)
                return Seen(number, int(pack.starts[place]), int(pack.views[place]), (height, width), problem)
        return None

    def read(self, seen: Seen) -> Tensor:
        """The features of a picture's views: `(views, P, V)`; a frame has one."""
        return self.packs[seen.pack].read(seen.start, max(seen.views, 1))


def open_packs(store: Path) -> list[Pack]:
    """The whole packs of a store, the newest first."""
    found = []
    for form in sorted(store.glob(f"*/{FORM}"), key=_age, reverse=True):
        if not form.parent.name.endswith(PARTIAL):
            with suppress(FileNotFoundError):
                found.append(Pack(form.parent))
    return found


@contextmanager
def new_pack(
    store: Path, name: str, rows: int, form: Form, limit_gb: float | None, kept: Sequence[Pack]
) -> Iterator[Path]:
    """A folder to write a pack into, its space reserved; what is in it when this ends in an error goes.

    Args:
        store: where.
        name: of the pack.
        rows: views that it holds.
        form: what each is.
        limit_gb: see `make_room`.
        kept: packs that this run reads too.

    Raises:
        ValueError: there is no room for it.
    """
    folder = store / f"{name}{PARTIAL}"
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(store.parent / "lock"):
        sweep(store.parent)
        make_room(store.parent, rows * form.nbytes, limit_gb, kept)
        folder.mkdir()
        lock = _shared_lock(folder, create=True)
        with (folder / ROWS).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, rows * form.nbytes)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def opened_rows(folder: Path, form: Form) -> np.ndarray:
    """The rows of a pack that is being written: `(views, bytes)`."""
    file = folder / ROWS
    if not file.is_file():
        raise ValueError(
            f"{file}: another rank made it, and it is not here; dataset.cache_dir must be a folder that all machines "
            "share, or leave out dataset.cache_features"
        )
    return np.memmap(file, np.uint8, "r+").reshape(-1, form.nbytes)


def finish_pack(
    folder: Path, form: Form, keys: Sequence[bytes], starts: np.ndarray, views: np.ndarray, sizes: np.ndarray,
    problems: Mapping[int, tuple[str, str | None]],
) -> None:  # fmt: skip
    """Write the index of a pack whose rows are all there: it is whole from then on."""
    table = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
    order = np.lexsort((table[:, 1], table[:, 0]))
    np.savez(folder / INDEX, keys=table[order], starts=starts[order], views=views[order], sizes=sizes[order])
    place = {int(old): new for new, old in enumerate(order)}
    facts = {"form": asdict(form), "problems": {place[old]: problem for old, problem in problems.items()}}
    (folder / FORM).write_text(json.dumps(facts), encoding="utf-8")
    for name in (ROWS, INDEX, FORM):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    folder.rename(folder.with_name(folder.name.removesuffix(PARTIAL)))


def make_room(root: Path, needed: int, limit_gb: float | None, kept: Sequence[Pack]) -> None:
    """Remove the packs that no run has used for longest, until so many bytes fit; called under the root's lock.

    Args:
        root: the folder of all stores.
        needed: bytes of what is to come.
        limit_gb: most that all packs may take, in 10^9 bytes; None: half of what they and the free disk are.
        kept: packs that stay, whatever.

    Raises:
        ValueError: it does not fit; nothing was removed then.
    """
    sizes = {form.parent: (form.parent / ROWS).stat().st_size for form in root.glob(f"*/*/{FORM}")}
    being_written = sum(file.stat().st_size for file in root.glob(f"*/*{PARTIAL}/{ROWS}"))
    free, held = shutil.disk_usage(root).free, sum(sizes.values()) + being_written
    limit = (free + held) / 2 if limit_gb is None else limit_gb * 1e9
    own = {pack.folder for pack in kept}
    oldest = sorted((folder for folder in sizes if folder not in own), key=_age)
    going = []
    for folder in oldest:
        if held + needed <= limit and needed <= free:
            break
        if (lock := _lock_unused(folder)) is not None:
            going.append((folder, lock))
            held, free = held - sizes[folder], free + sizes[folder]
    fits = held + needed <= limit and needed <= free
    for folder, lock in going:
        if fits:
            (folder / FORM).unlink()  # first: it is whole no more
            shutil.rmtree(folder)
        os.close(lock)
    if not fits:
        bound = "half of what it and the free disk are" if limit_gb is None else f"dataset.cache_limit_gb={limit_gb:g}"
        raise ValueError(
            f"dataset.cache_features=true: features of the pictures need {needed / 1e9:.3g} GB more in {root}, where "
            f"{held / 1e9:.3g} GB are in use; {limit / 1e9:.3g} GB are allowed ({bound}) and {free / 1e9:.3g} GB free. "
            "Raise dataset.cache_limit_gb, set dataset.cache_dir to another disk, take fewer records "
            "(dataset.max_samples), or leave out dataset.cache_features"
        )


def sweep(root: Path) -> None:
    """Remove what runs that were killed have left; called under the root's lock."""
    for folder in [*root.glob(f"*/*{PARTIAL}"), *(one.parent for one in root.glob(f"*/*/{ROWS}"))]:
        if not (folder / FORM).is_file() or folder.name.endswith(PARTIAL):
            if not (folder / USED).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            elif (lock := _lock_unused(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _age(path: Path) -> float:
    """When a pack, or the one that a file belongs to, was last used."""
    used = (path if path.is_dir() else path.parent) / USED
    return used.stat().st_mtime if used.is_file() else 0.0


def _shared_lock(folder: Path, *, create: bool = False) -> int:
    """Hold a pack: nobody removes it while this, or a process forked from it, has the descriptor open."""
    lock = os.open(folder / USED, os.O_RDWR | (os.O_CREAT if create else 0))
    fcntl.flock(lock, fcntl.LOCK_SH)
    if not (create or (folder / FORM).is_file()):
        os.close(lock)
        raise FileNotFoundError(folder)
    return lock


def _lock_unused(folder: Path) -> int | None:
    """Hold a pack alone; None: somebody uses it."""
    lock = os.open(folder / USED, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
