"""Features that the ranks of a run compute together, once, and keep on disk: of images, and of records for heads.

Later epochs and later runs read them. `FeatureComputation` is what differs between kinds of features; where they lie is
said in `data/feature_cache/store.py`.
"""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import TrainingArguments

from vlm.data.dataset import Skipped
from vlm.data.feature_cache.reader import Pack, open_shared_pack
from vlm.data.feature_cache.store import FeatureStore, Item, PackPlan
from vlm.train.distributed import all_gather_objects, barrier, broadcast_from_rank0, rank0_lock

Loaded = TypeVar("Loaded")
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ItemFeatures:
    """What was computed of an item.

    Attributes:
        features: for each pack that is being written, `(rows, P, V)`, on the CPU.
        details: see `Pack`; None: they are as planned.
    """

    features: Sequence[Tensor]
    details: tuple[int, ...] | None = None


class FeatureComputation(ABC, Generic[Item, Batch]):
    """Computes features of items, each rank those of its share.

    Attributes:
        args: devices, precision, batch size, workers.
        description: of the progress bar.
        reason: why another run with the same store is waited for, for the log.
    """

    args: TrainingArguments
    description: str
    reason: str

    @abstractmethod
    def load(self, items: list[Item], skipped: dict[int, Skipped]) -> Iterable[Batch]:
        """Return this rank's batches of items, without those that are known to be skipped."""

    @abstractmethod
    def compute(self, plans: Sequence[PackPlan[Item]], batch: Batch) -> Iterator[tuple[int, ItemFeatures | Skipped]]:
        """Yield the index of each item of a batch, with its features for each pack or the reason why it has none.

        Raises:
            ValueError: an item has none, and the run does not leave such out.
        """

    def check_skipped(self, skipped: list[Skipped]) -> None:
        """Take note, on every rank, of the items without features before a pack is whole.

        Raises:
            ValueError: they are too many.
        """

    def make_loader(
        self, dataset: Dataset[Loaded], batches: list[list[int]], collate: Callable[[list[Loaded]], Batch]
    ) -> Iterable[Batch]:
        """Return what loads this rank's share of batches, given by the indices of their items."""
        args = self.args
        share = batches[args.process_index :: args.world_size]
        workers = args.dataloader_num_workers
        return DataLoader(dataset, batch_sampler=share, collate_fn=collate, num_workers=workers)


class FeatureCacheWriter(Generic[Item, Batch]):
    """Opens packs of a store on all ranks, and has them compute those that are missing.

    Args:
        store: where the packs are.
        computation: computes what is in them.
    """

    def __init__(self, store: FeatureStore, computation: FeatureComputation[Item, Batch]):
        self.store, self.computation = store, computation

    def open(self, find: Callable[[], tuple[list[Pack], list[list[PackPlan[Item]]]]]) -> list[Pack]:
        """Return packs that are open on this rank; no other run writes to the store meanwhile.

        Args:
            find: called on rank 0 alone: the packs that are there, and lists of packs to compute; those of a list have
                the same items and are computed in one pass.

        Raises:
            ValueError: there is no room for the packs, other ranks do not see them, or items may not be skipped.
        """
        with rank0_lock(self.store.folder / "lock", self.computation.reason) as first:
            packs, passes = find() if first else ([], [])
            if passes:
                gc.collect()  # packs that an earlier run in this process read can be removed then
                self.store.reserve(sum(plan.nbytes for plans in passes for plan in plans))
            for number in range(broadcast_from_rank0(len(passes))):
                packs += self._write(passes[number] if first else [])
            folders = broadcast_from_rank0([pack.folder for pack in packs])
            if not first:
                packs = list(map(open_shared_pack, folders))
            barrier()
        for pack in packs:
            pack.touch()
        return packs

    def _write(self, plans: list[PackPlan[Item]]) -> list[Pack]:
        """Let all ranks write packs, which rank 0 alone knows at first and opens."""
        with ExitStack() as stack:
            folders = [stack.enter_context(self.store.create_pack(plan)) for plan in plans]
            first = bool(plans)
            folders, plans = broadcast_from_rank0((folders, plans))
            self._compute_rows(folders, plans)
            return [Pack(self.store.finalize_pack(plan)) for plan in plans] if first else []

    def _compute_rows(self, folders: list[Path], plans: list[PackPlan[Item]]) -> None:
        """Write this rank's share of rows; afterwards every rank knows all details and skipped items."""
        args, computation = self.computation.args, self.computation
        files = [plan.format.map_rows(folder, "r+") for folder, plan in zip(folders, plans, strict=True)]
        details: dict[int, tuple[int, ...]] = {}
        skipped: dict[int, Skipped] = {}
        batches = computation.load(plans[0].items, plans[0].skipped)
        for batch in tqdm(batches, computation.description, disable=args.disable_tqdm or args.process_index != 0):
            for item, result in computation.compute(plans, batch):
                if isinstance(result, Skipped):
                    skipped[item] = result
                    continue
                if result.details is not None:
                    details[item] = result.details
                for file, plan, features in zip(files, plans, result.features, strict=True):
                    start = plan.starts[item]
                    values = features.contiguous().view(torch.uint8).flatten(1).numpy()
                    file[start : start + plan.counts[item]] = values
        for file in files:
            file.flush()  # pyright: ignore[reportAttributeAccessIssue] - a memory map
        for rank_details, rank_skipped in all_gather_objects((details, skipped)):
            for plan in plans:
                plan.skipped |= rank_skipped
                for item, values in rank_details.items():
                    plan.details[item] = values
        computation.check_skipped([record for _, record in sorted(plans[0].skipped.items())])
