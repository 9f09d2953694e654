"""What a frozen visual encoder gives for pictures, computed once by all ranks of a run and kept on disk.

Later epochs, and later runs with the same encoder, read it in place of opening pictures. It is kept by the content of
pictures, so that runs which share some share their features; see `data/feature_files.py` and `data/feature_store.py`.
"""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vlm.config.schema import DatasetConfig
from vlm.data.cache import cache_folder, digest_of
from vlm.data.dataset import Skipped
from vlm.data.feature_cache.dataset import FRAME, WHOLE
from vlm.data.feature_cache.reader import ImageFeatures, Pack, open_packs, shared_pack
from vlm.data.feature_cache.store import clear, finish_pack, new_pack, opened_rows
from vlm.data.sample import BadSample
from vlm.data.sources import Source
from vlm.data.vision.images import check_picture
from vlm.train.distributed import as_first_rank, gathered_objects, locked_by_first_rank, wait
from vlm.train.feature_cache.encoder import BLANK, Encoding, Pictures, Request

log = logging.getLogger(__name__)

Problem = tuple[str, str | None]
"""Why a picture does not open, and its file."""

PACK_VIEWS = 2**16
"""About so many views are in a pack: a run that is stopped while it encodes loses the last one's."""


@dataclass
class Plan:
    """A pack that is to be computed.

    Attributes:
        keys: of its pictures.
        requests: the pictures.
        views: `(pictures,)`: as `AnyRes.num_views` counts them.
        sizes: `(pictures, 2)`: height and width, where known before; else 0.
        problems: which do not open.
    """

    keys: list[bytes]
    requests: list[Request]
    views: np.ndarray
    sizes: np.ndarray
    problems: dict[int, Problem]

    @property
    def name(self) -> str:
        """Of the pack."""
        return digest_of([key.hex() for key in self.keys])

    @cached_property
    def starts(self) -> np.ndarray:
        """The first view of each picture: `(pictures,)`."""
        rows = np.maximum(self.views, 1)
        return rows.cumsum() - rows

    @property
    def rows(self) -> int:
        """How many views it has room for: a frame's too."""
        return int(np.maximum(self.views, 1).sum())


def refuse_bad(error: BadSample, source: Source, record: int, config: DatasetConfig) -> None:
    """Raise ValueError at a record that cannot be used, where such are not left out."""
    if config.on_bad_sample == "error":
        raise Skipped.by(error, source, record).refusal() from error


class Filler:
    """Finds what is kept of pictures, and has all ranks compute the rest.

    Args:
        encoding: what computes it.
        sources: of all records.
        config: cache, its limit, and what happens with pictures that do not open.
    """

    def __init__(self, encoding: Encoding, sources: Sequence[Source], config: DatasetConfig):
        self.encoding, self.sources, self.config = encoding, sources, config
        self.form = as_first_rank(encoding.form())  # its machine's pages
        first = encoding.args.process_index == 0
        self.store = (
            cache_folder(config.cache_dir) / "image_features" / as_first_rank(encoding.digest() if first else "")
        )
        self.features = ImageFeatures([])

    def add(self, find: Callable[[], dict[bytes, Request]]) -> None:
        """Open the packs that hold the pictures which `find()` gives on rank 0, after those of which none does."""
        with locked_by_first_rank(self.store / "lock", "it encodes pictures with the same encoder") as first:
            requests = find() if first else {}
            packs = self._kept(requests) if first else []
            missing = {key: one for key, one in requests.items() if ImageFeatures(packs).find(key) is None}
            plans = self._plans(missing, packs)
            for number in range(as_first_rank(len(plans))):
                self._compute(plans[number] if first else None, packs)
            mine = {pack.folder: pack for pack in packs}
            known = {pack.folder for pack in self.features.packs}
            new = [folder for folder in as_first_rank(list(mine)) if folder not in known]
            opened = [mine.pop(folder) if first else shared_pack(folder) for folder in new]
            for pack in mine.values():  # open already
                pack.close()
            self.features = ImageFeatures([*self.features.packs, *opened])
            wait()
        for pack in self.features.packs:
            pack.touch()

    def _kept(self, requests: Mapping[bytes, Request]) -> list[Pack]:
        """The packs that hold any of the pictures."""
        found = []
        for pack in open_packs(self.store):
            if any(pack.place(key) is not None for key in requests):
                found.append(pack)
            else:
                pack.close()
        return found

    def _plans(self, missing: dict[bytes, Request], packs: Sequence[Pack]) -> list[Plan]:
        """What is to be computed, pack by pack, when there is room for all."""
        if not missing:
            return []
        keys = sorted(missing, key=lambda key: (missing[key].source, missing[key].record))
        requests = [missing[key] for key in keys]
        views, sizes, problems = self._measured(requests)
        ends = np.maximum(views, 1).cumsum()
        nbytes = int(ends[-1]) * self.form.stride
        log.info("The visual encoder sees %s pictures, %.3g GB", f"{len(keys):,}", nbytes / 1e9)
        gc.collect()  # a run in this process that is over reads its packs no more
        clear(self.store.parent, nbytes, self.config.cache_limit_gb, [*packs, *self.features.packs])
        borders = np.flatnonzero(np.diff((ends - 1) // PACK_VIEWS)) + 1
        return [
            Plan(
                keys[first:last], requests[first:last], views[first:last], sizes[first:last],
                {number - first: problem for number, problem in problems.items() if first <= number < last},
            )
            for first, last in pairwise([0, *borders.tolist(), len(keys)])
        ]  # fmt: skip

    def _compute(self, plan: Plan | None, packs: list[Pack]) -> None:
        """Let all ranks write a pack, which rank 0 alone knows at first and adds to its own."""
        told: Any = None
        if plan is None:
            self._fill(*as_first_rank(told))
            return
        limit, kept = self.config.cache_limit_gb, [*packs, *self.features.packs]
        with new_pack(self.store, plan.name, plan.rows, self.form, limit, kept) as folder:
            folder, plan = as_first_rank((folder, plan))
            self._fill(folder, plan)
            finish_pack(folder, self.form, plan.keys, plan.starts, plan.views, plan.sizes, plan.problems)
            packs.append(Pack(self.store / plan.name))

    def _measured(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray, dict[int, Problem]]:
        """Views of each picture; sizes and problems as far as they are known then: all where sizes decide on views."""
        views = np.array([0 if one.kind == FRAME else 1 for one in requests])
        sizes = np.zeros((len(requests), 2), dtype=np.int64)
        problems: dict[int, Problem] = {}
        tiling = self.encoding.processor.tiling
        if tiling is None:
            return views, sizes, problems
        for number, one in enumerate(requests):
            if one.kind == FRAME:
                continue
            try:
                sizes[number] = one.size if one.source == BLANK else self._size(one)
            except BadSample as error:
                refuse_bad(error, self.sources[one.source], one.record, self.config)
                problems[number] = error.reason, error.file
                continue
            if one.kind != WHOLE:
                (views[number],) = tiling.num_views([tuple(sizes[number].tolist())])
        return views, sizes, problems

    def _size(self, request: Request) -> tuple[int, int]:
        sample = self.sources[request.source].sample(request.record)
        width, height = check_picture(sample.pictures[request.place], sample.id)
        return height, width

    def _fill(self, folder: Path, plan: Plan) -> None:
        """Compute a plan's rows: this rank's share, every so many batches of records; sizes and problems get known."""
        args = self.encoding.args
        rows = opened_rows(folder, self.form)
        jobs: dict[tuple[int, int], list[int]] = {}
        for number, one in enumerate(plan.requests):
            if number not in plan.problems:
                together = (BLANK, number) if one.source == BLANK else (one.source, one.record)
                jobs.setdefault(together, []).append(number)
        work = list(jobs.values())
        size = args.per_device_train_batch_size
        batches = [list(range(start, min(start + size, len(work)))) for start in range(0, len(work), size)]
        loader = DataLoader(
            Pictures(self.encoding.processor, self.sources, plan.requests, work),
            batch_sampler=batches[args.process_index :: args.world_size], collate_fn=_listed,
            num_workers=args.dataloader_num_workers,
        )  # fmt: skip
        found: dict[int, tuple[int, int]] = {}
        problems: dict[int, Problem] = {}
        for seen in tqdm(loader, "seeing pictures", disable=args.disable_tqdm or args.process_index != 0):
            whole = [one for one in seen if not isinstance(one[1], BadSample)]
            for number, error in (one for one in seen if isinstance(one[1], BadSample)):
                request = plan.requests[number]
                refuse_bad(error, self.sources[request.source], request.record, self.config)
                problems[number] = error.reason, error.file
            self._write(rows, plan, whole)
            found |= {number: size for number, (_, size) in whole}
        rows.flush()  # pyright: ignore[reportAttributeAccessIssue] - a memory map
        for sizes, bad in gathered_objects((found, problems)):
            plan.problems |= bad
            for number, size in sizes.items():
                plan.sizes[number] = size
        wait()

    def _write(self, rows: np.ndarray, plan: Plan, seen: Sequence[tuple[int, tuple[Tensor, tuple[int, int]]]]) -> None:
        """Encode pictures, and put their features in their places."""
        if not seen:
            return
        pixels = [pixels for _, (pixels, _) in seen]
        features = self.encoding(torch.cat(pixels))
        for (number, _), one in zip(seen, features.split([len(views) for views in pixels]), strict=True):
            start = int(plan.starts[number])
            rows[start : start + len(one)] = one.contiguous().view(torch.uint8).flatten(1).numpy()


def _listed(items: Sequence[list[tuple[int, Any]]]) -> list[tuple[int, Any]]:
    return [one for item in items for one in item]
