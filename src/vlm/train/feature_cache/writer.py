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
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.dataset import Skipped
from vlm.data.feature_cache.dataset import FRAME_VIEW, SQUARE_VIEW
from vlm.data.feature_cache.reader import ImageFeatures, Pack, open_all_packs, open_shared_pack
from vlm.data.feature_cache.store import create_pack, finalize_pack, make_room_for_packs, map_new_rows
from vlm.data.sample import BadSample
from vlm.data.sources import Source
from vlm.data.vision.images import read_image_size
from vlm.train.distributed import all_gather_objects, barrier, broadcast_from_rank0, rank0_lock
from vlm.train.feature_cache.encoder import BLANK_SOURCE, FeatureRequest, FrozenVisualEncoder, RequestedImages

log = logging.getLogger(__name__)

ImageError = tuple[str, str | None]
"""Why a picture does not open, and its file."""

VIEWS_PER_PACK = 2**16
"""About so many views are in a pack: a run that is stopped while it encodes loses the last one's."""


@dataclass
class PackPlan:
    """A pack that is to be computed.

    Attributes:
        keys: of its pictures.
        requests: the pictures.
        views: `(pictures,)`: as `AnyRes.num_views` counts them.
        sizes: `(pictures, 2)`: height and width, where known before; else 0.
        problems: which do not open.
    """

    keys: list[bytes]
    requests: list[FeatureRequest]
    views: np.ndarray
    sizes: np.ndarray
    problems: dict[int, ImageError]

    @property
    def name(self) -> str:
        """Of the pack."""
        return json_digest([key.hex() for key in self.keys])

    @cached_property
    def starts(self) -> np.ndarray:
        """The first view of each picture: `(pictures,)`."""
        rows = np.maximum(self.views, 1)
        return rows.cumsum() - rows

    @property
    def rows(self) -> int:
        """How many views it has room for: a frame's too."""
        return int(np.maximum(self.views, 1).sum())


def raise_unless_skipped(error: BadSample, source: Source, record: int, config: DatasetConfig) -> None:
    """Raise ValueError at a record that cannot be used, where such are not left out."""
    if config.on_bad_sample == "error":
        raise Skipped.from_error(error, source, record).as_error() from error


class FeatureCacheWriter:
    """Finds what is kept of pictures, and has all ranks compute the rest.

    Args:
        encoding: what computes it.
        sources: of all records.
        config: cache, its limit, and what happens with pictures that do not open.
    """

    def __init__(self, encoding: FrozenVisualEncoder, sources: Sequence[Source], config: DatasetConfig):
        self.encoding, self.sources, self.config = encoding, sources, config
        self.form = broadcast_from_rank0(encoding.form())  # its machine's pages
        first = encoding.args.process_index == 0
        self.store = (
            resolve_cache_folder(config.cache_dir)
            / "image_features"
            / broadcast_from_rank0(encoding.digest() if first else "")
        )
        self.features = ImageFeatures([])

    def add(self, find: Callable[[], dict[bytes, FeatureRequest]]) -> None:
        """Open the packs that hold the pictures which `find()` gives on rank 0, after those of which none does."""
        with rank0_lock(self.store / "lock", "it encodes pictures with the same encoder") as first:
            requests = find() if first else {}
            packs = self._open_matching_packs(requests) if first else []
            missing = {key: one for key, one in requests.items() if ImageFeatures(packs).find(key) is None}
            plans = self._plan_packs(missing, packs)
            for number in range(broadcast_from_rank0(len(plans))):
                self._compute_pack(plans[number] if first else None, packs)
            open_by_folder = {pack.folder: pack for pack in packs}
            known = {pack.folder for pack in self.features.packs}
            new = [folder for folder in broadcast_from_rank0(list(open_by_folder)) if folder not in known]
            opened = [open_by_folder.pop(folder) if first else open_shared_pack(folder) for folder in new]
            for pack in open_by_folder.values():  # open already
                pack.close()
            self.features = ImageFeatures([*self.features.packs, *opened])
            barrier()
        for pack in self.features.packs:
            pack.touch()

    def _open_matching_packs(self, requests: Mapping[bytes, FeatureRequest]) -> list[Pack]:
        """The packs that hold any of the pictures."""
        found = []
        for pack in open_all_packs(self.store):
            if any(pack.place(key) is not None for key in requests):
                found.append(pack)
            else:
                pack.close()
        return found

    def _plan_packs(self, missing: dict[bytes, FeatureRequest], packs: Sequence[Pack]) -> list[PackPlan]:
        """What is to be computed, pack by pack, when there is room for all."""
        if not missing:
            return []
        keys = sorted(missing, key=lambda key: (missing[key].source, missing[key].record))
        requests = [missing[key] for key in keys]
        views, sizes, problems = self._count_views(requests)
        ends = np.maximum(views, 1).cumsum()
        nbytes = int(ends[-1]) * self.form.stride
        log.info("The visual encoder sees %s pictures, %.3g GB", f"{len(keys):,}", nbytes / 1e9)
        gc.collect()  # a run in this process that is over reads its packs no more
        make_room_for_packs(self.store.parent, nbytes, self.config.cache_limit_gb, [*packs, *self.features.packs])
        borders = np.flatnonzero(np.diff((ends - 1) // VIEWS_PER_PACK)) + 1
        return [
            PackPlan(
                keys[first:last], requests[first:last], views[first:last], sizes[first:last],
                {number - first: problem for number, problem in problems.items() if first <= number < last},
            )
            for first, last in pairwise([0, *borders.tolist(), len(keys)])
        ]  # fmt: skip

    def _compute_pack(self, plan: PackPlan | None, packs: list[Pack]) -> None:
        """Let all ranks write a pack, which rank 0 alone knows at first and adds to its own."""
        told: Any = None
        if plan is None:
            self._compute_rows(*broadcast_from_rank0(told))
            return
        limit, kept = self.config.cache_limit_gb, [*packs, *self.features.packs]
        with create_pack(self.store, plan.name, plan.rows, self.form, limit, kept) as folder:
            folder, plan = broadcast_from_rank0((folder, plan))
            self._compute_rows(folder, plan)
            finalize_pack(folder, self.form, plan.keys, plan.starts, plan.views, plan.sizes, plan.problems)
            packs.append(Pack(self.store / plan.name))

    def _count_views(self, requests: Sequence[FeatureRequest]) -> tuple[np.ndarray, np.ndarray, dict[int, ImageError]]:
        """Views of each picture; sizes and problems as far as they are known then: all where sizes decide on views."""
        views = np.array([0 if one.kind == FRAME_VIEW else 1 for one in requests])
        sizes = np.zeros((len(requests), 2), dtype=np.int64)
        problems: dict[int, ImageError] = {}
        tiling = self.encoding.processor.tiling
        if tiling is None:
            return views, sizes, problems
        for number, one in enumerate(requests):
            if one.kind == FRAME_VIEW:
                continue
            try:
                sizes[number] = one.size if one.source == BLANK_SOURCE else self._read_image_size(one)
            except BadSample as error:
                raise_unless_skipped(error, self.sources[one.source], one.record, self.config)
                problems[number] = error.reason, error.file
                continue
            if one.kind != SQUARE_VIEW:
                (views[number],) = tiling.num_views([tuple(sizes[number].tolist())])
        return views, sizes, problems

    def _read_image_size(self, request: FeatureRequest) -> tuple[int, int]:
        sample = self.sources[request.source].sample(request.record)
        width, height = read_image_size(sample.images[request.place], sample.id)
        return height, width

    def _compute_rows(self, folder: Path, plan: PackPlan) -> None:
        """Compute a plan's rows: this rank's share, every so many batches of records; sizes and problems get known."""
        args = self.encoding.args
        rows = map_new_rows(folder, self.form)
        requests_by_record: dict[tuple[int, int], list[int]] = {}
        for number, one in enumerate(plan.requests):
            if number not in plan.problems:
                group_key = (BLANK_SOURCE, number) if one.source == BLANK_SOURCE else (one.source, one.record)
                requests_by_record.setdefault(group_key, []).append(number)
        request_groups = list(requests_by_record.values())
        size = args.per_device_train_batch_size
        batches = [
            list(range(start, min(start + size, len(request_groups)))) for start in range(0, len(request_groups), size)
        ]
        loader = DataLoader(
            RequestedImages(self.encoding.processor, self.sources, plan.requests, request_groups),
            batch_sampler=batches[args.process_index :: args.world_size], collate_fn=_flatten_batch,
            num_workers=args.dataloader_num_workers,
        )  # fmt: skip
        found: dict[int, tuple[int, int]] = {}
        problems: dict[int, ImageError] = {}
        for seen in tqdm(loader, "seeing pictures", disable=args.disable_tqdm or args.process_index != 0):
            whole = [one for one in seen if not isinstance(one[1], BadSample)]
            for number, error in (one for one in seen if isinstance(one[1], BadSample)):
                request = plan.requests[number]
                raise_unless_skipped(error, self.sources[request.source], request.record, self.config)
                problems[number] = error.reason, error.file
            self._write(rows, plan, whole)
            found |= {number: size for number, (_, size) in whole}
        rows.flush()  # pyright: ignore[reportAttributeAccessIssue] - a memory map
        for sizes, bad in all_gather_objects((found, problems)):
            plan.problems |= bad
            for number, size in sizes.items():
                plan.sizes[number] = size
        barrier()

    def _write(
        self, rows: np.ndarray, plan: PackPlan, seen: Sequence[tuple[int, tuple[Tensor, tuple[int, int]]]]
    ) -> None:
        """Encode pictures, and put their features in their places."""
        if not seen:
            return
        pixels = [pixels for _, (pixels, _) in seen]
        features = self.encoding(torch.cat(pixels))
        for (number, _), one in zip(seen, features.split([len(views) for views in pixels]), strict=True):
            start = int(plan.starts[number])
            rows[start : start + len(one)] = one.contiguous().view(torch.uint8).flatten(1).numpy()


def _flatten_batch(items: Sequence[list[tuple[int, Any]]]) -> list[tuple[int, Any]]:
    return [one for item in items for one in item]
