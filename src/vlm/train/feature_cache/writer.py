"""Features that the ranks of a run compute together, once, and keep on disk: of images, and of records for heads.

Later epochs and later runs read them. Where they lie is said in `data/feature_cache/store.py`.
"""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from vlm.data.feature_cache.store import FeatureStore, Item, Pack, PackPlan
from vlm.data.progress import show_progress
from vlm.data.skipped import Skipped
from vlm.train.distributed import all_gather_objects, barrier, broadcast_from_rank0, rank0_lock

Batch = TypeVar("Batch")

ItemFeatures = list[Tensor]
"""Features of an item for each pack that is written: `(rows, P, V)` on the CPU."""

PacksAndPlans = tuple[list[Pack], list[list[PackPlan[Item]]]]
"""Packs that are there, and lists of packs to write; those of a list have the same items and are written together."""


class FeatureCacheWriter(ABC, Generic[Item, Batch]):
    """Opens packs of a store on all ranks, after those that are missing were computed; each rank does a share.

    A kind of features is a subclass, which says how items are loaded and what is computed of them.

    Attributes:
        store: where the packs are.
        args: devices, precision, batch size, workers.
        on_skipped: called with records that turn out to be unusable, before a pack is whole, and a number of samples;
            raises ValueError where they may not be left out.
        description: of the progress bar.
        reason: why another run with the same store is waited for, for the log.
    """

    store: FeatureStore
    args: TrainingArguments
    on_skipped: Callable[[list[Skipped], int], None]
    description: str
    reason: str

    @abstractmethod
    def batches(self, plan: PackPlan[Item]) -> list[list[int]]:
        """Return batches of the indices of a plan's items, without those that it skips."""

    @abstractmethod
    def load(self, plan: PackPlan[Item], indices: list[int]) -> tuple[dict[int, Skipped], Batch]:
        """Return those of a batch's items that turn out to be unusable, and a batch of the others; in a data worker."""

    @abstractmethod
    def compute(self, plans: list[PackPlan[Item]], batch: Batch) -> Iterable[tuple[int, ItemFeatures]]:
        """Return the index of each item of a batch with its features."""

    def open(self, find_packs: Callable[[], PacksAndPlans[Item]]) -> list[Pack]:
        """Return packs that are open on this rank, where `find_packs` is called on rank 0.

        No other run writes to the store meanwhile.

        Raises:
            ValueError: there is no room for the packs, other ranks do not see them, or items may not be skipped.
        """
        with rank0_lock(self.store.folder / "lock", self.reason) as first:
            packs, passes = find_packs() if first else ([], [])
            if passes:
                gc.collect()  # packs that an earlier run in this process read can be removed then
                with self.store.lock():
                    self.store.make_room(sum(plan.nbytes for plans in passes for plan in plans))
            for number in range(broadcast_from_rank0(len(passes))):
                packs += self._write(passes[number] if first else [])
            folders = broadcast_from_rank0([pack.folder for pack in packs])
            if not first:
                packs = [Pack(require_folder(folder)) for folder in folders]
            barrier()
        for pack in packs:
            pack.touch()
        return packs

    def _write(self, plans: list[PackPlan[Item]]) -> list[Pack]:
        """Let all ranks write packs, which rank 0 alone knows at first and opens."""
        with ExitStack() as stack:
            first, folders = bool(plans), [stack.enter_context(self.store.create_pack(plan)) for plan in plans]
            folders, plans = broadcast_from_rank0((folders, plans))
            self._compute_rows(folders, plans)
            return [Pack(self.store.finalize_pack(plan)) for plan in plans] if first else []

    def _compute_rows(self, folders: list[Path], plans: list[PackPlan[Item]]) -> None:
        """Write this rank's share of rows; afterwards every rank knows all skipped items."""
        args = self.args
        skipped: dict[int, Skipped] = {}
        files = [plan.format.map_rows(require_folder(path), "r+") for path, plan in zip(folders, plans, strict=True)]
        share: Any = self.batches(plans[0])[args.process_index :: args.world_size]
        load = partial(self.load, plans[0])
        loader = DataLoader(share, batch_size=None, collate_fn=load, num_workers=args.dataloader_num_workers)
        silent = args.disable_tqdm or args.process_index != 0
        for unusable, batch in show_progress(loader, self.description, unit="batch", silent=silent):
            skipped |= unusable
            self.on_skipped(list(unusable.values()), 0)
            for item, result in self.compute(plans, batch):
                for file, plan, features in zip(files, plans, result, strict=True):
                    rows = slice(plan.starts[item], plan.starts[item] + plan.counts[item])
                    file[rows] = features.contiguous().view(torch.uint8).flatten(1).numpy()
        for file in files:
            file.flush()  # pyright: ignore[reportAttributeAccessIssue] - a memory map
        for rank_skipped in all_gather_objects(skipped):
            for plan in plans:
                plan.skipped |= rank_skipped
        self.on_skipped([record for _, record in sorted(plans[0].skipped.items())], 0)


def require_folder(folder: Path) -> Path:
    """Return the folder of a pack; raise ValueError where another rank has it and this one does not see it."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: another rank wrote it, but this machine cannot see it; dataset.cache_dir must be a folder "
            "that all machines share, or set dataset.cache_features=false"
        )
    return folder
