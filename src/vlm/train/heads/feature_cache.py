"""What heads read of a frozen body, computed once and kept on disk: further epochs and other heads cost seconds.

A file is named by everything that its content depends on: the records and how they become tokens, their pictures, every
weight of the body, what is read of it, and the code and precision that compute it. It is read through memory maps.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import TrainingArguments

from vlm.data.batching.collator import SKIPPED_KEY
from vlm.data.cache import json_digest
from vlm.data.dataset import Skipped
from vlm.data.heads.dataset import HeadCollator, HeadDataset
from vlm.models import VLMForPrediction
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.poolings import EVERY_TOKEN_POOLINGS
from vlm.train.distributed import all_gather_objects, barrier, broadcast_from_rank0, rank0_lock
from vlm.train.feature_cache.fingerprints import code_digest, records_digest

log = logging.getLogger(__name__)

PARTIAL_SUFFIX, LOCK_NAME = ".partial.npy", "lock"
"""How the name of a file ends that is not whole, and what is locked while a run writes in a folder."""


@dataclass(frozen=True)
class FeatureSpec:
    """What is read of hidden states.

    Attributes:
        pooling: a pooling without weights of its own, or `tokens`: all of them.
        layer: index into `hidden_states`; None: the last.
        token_id: the token at which it reads, if it reads at one.
    """

    pooling: str
    layer: int | None
    token_id: int | None

    @classmethod
    def of(cls, head: HeadSettings) -> "FeatureSpec":
        """What a head reads."""
        pooling = "tokens" if head.pooling in EVERY_TOKEN_POOLINGS else head.pooling
        return cls(pooling, head.layer, head.token_id)


@dataclass(frozen=True)
class HeadFeatures:
    """What heads read of each record of a dataset.

    Attributes:
        places: `(source, record)` -> row.
        rows: reading -> `(records, D)`, or `(all tokens, D)` where every token is read.
        starts: `(records + 1,)`: where the tokens of each record begin.
        absent: rows of records that turned out to be unusable.
    """

    places: dict[tuple[int, int], int]
    rows: dict[FeatureSpec, np.ndarray]
    starts: np.ndarray
    unusable_rows: frozenset[int]

    def of(self, spec: FeatureSpec, row: int) -> np.ndarray:
        """What is read of a record: `(D,)`, or `(T, D)`."""
        if spec.pooling == "tokens":
            return self.rows[spec][self.starts[row] : self.starts[row + 1]]
        return self.rows[spec][row]


class HeadFeatureDataset(Dataset[Any]):
    """A `HeadDataset` whose pictures and prompts have been read already.

    Args:
        dataset: the samples.
        features: of all of them.
        heads: the model's.
    """

    def __init__(self, dataset: HeadDataset, features: HeadFeatures, heads: Sequence[HeadSettings]):
        rows = np.array([features.places[source, record] for source, record in dataset.dataset.places.tolist()])
        usable = np.flatnonzero(~np.isin(rows, list(features.unusable_rows)))
        self.samples = dataset if len(usable) == len(rows) else dataset.subset(usable)
        self.features, self.rows = features, rows[usable]
        self.specs = {head.name: FeatureSpec.of(head) for head in heads}
        self.targets = {head.name: self.samples.targets(head.name).astype(np.float32) for head in heads}

    @property
    def group_indices(self) -> np.ndarray:
        """`(samples,)`: equal where a ranking compares samples, negative where it compares with no other."""
        return self.samples.group_indices

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`features` of each head, its `targets`, and the `group`."""
        row = int(self.rows[index])
        return {
            "features": {name: self.features.of(spec, row) for name, spec in self.specs.items()},
            "targets": {name: values[index] for name, values in self.targets.items()},
            "group": int(self.samples.group_indices[index]),
        }


def collate_features(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of `HeadFeatureDataset` items; `attention_mask` says which tokens are real where every token is read."""
    batch: dict[str, Any] = {"features": {}}
    for name, first in items[0]["features"].items():
        found = [np.asarray(item["features"][name], dtype=np.float32) for item in items]
        if first.ndim == 2:
            longest = max(map(len, found))
            mask = np.stack([np.arange(longest) < len(one) for one in found])
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
            found = [np.pad(one, ((0, longest - len(one)), (0, 0))) for one in found]
        batch["features"][name] = torch.from_numpy(np.stack(found))
    names = items[0]["targets"]
    batch["targets"] = {name: torch.from_numpy(np.stack([item["targets"][name] for item in items])) for name in names}
    batch["groups"] = torch.tensor([item["group"] for item in items])
    return batch


def load_or_compute_features(
    model: VLMForPrediction, body: str, dataset: HeadDataset, collate: HeadCollator, args: TrainingArguments,
    cache: Path, on_skipped: Callable[[list[Skipped], int], None] = lambda skipped_rows, number: None,
) -> HeadFeatures:  # fmt: skip
    """What the model's heads read of a dataset: found in the cache, or computed now by all ranks.

    Args:
        model: the model, whose body is frozen.
        body: see `digests.body_digest`; of a large one it takes a while.
        dataset: the samples.
        collate: lays them out.
        args: batch size, workers, devices, precision.
        cache: the cache's folder.
        on_skipped: told of the records that turn out to be unusable, and of how many there are in all, before anything
            is kept; it may refuse them.

    Raises:
        ValueError: there is no room for it, or other ranks see another disk.
    """
    samples = dataset.dataset
    places, first = np.unique(samples.places, axis=0, return_index=True)
    starts = np.concatenate([[0], samples.lengths[first].astype(np.int64).cumsum()])
    specs = list(dict.fromkeys(map(FeatureSpec.of, model.config.settings)))
    name = json_digest(
        records_digest(samples, first), dataset.shown_images, body, str(model.dtype), code_digest(FeatureComputation),
        args.bf16, args.fp16,
    )  # fmt: skip
    folder = cache / "features" / name
    with _exclusive_cache_access(folder):
        missing = broadcast_from_rank0([one for one in specs if not feature_file(folder, one).is_file()])
        if missing:
            FeatureComputation(model, dataset, collate, args, folder, missing, on_skipped)(first, starts)
        else:
            log.info("What the heads read of %s records is in the cache: %s", f"{len(first):,}", folder)
    skipped_rows = {}
    for spec in specs:
        skipped_rows |= read_skipped_rows(folder, spec)
    if not missing:
        on_skipped([skipped_rows[row] for row in sorted(skipped_rows)], len(dataset))
    rows = {spec: np.load(feature_file(folder, spec), mmap_mode="r") for spec in specs}
    return HeadFeatures(
        {(s, r): row for row, (s, r) in enumerate(places.tolist())}, rows, starts, frozenset(skipped_rows)
    )  # fmt: skip


def feature_file(folder: Path, spec: FeatureSpec) -> Path:
    """Where a reading is kept."""
    return folder / f"{json_digest(spec.pooling, spec.layer, spec.token_id)}.npy"


def partial_feature_file(folder: Path, spec: FeatureSpec) -> Path:
    """Where it is written before it is whole: the same file again after a run that was killed."""
    return feature_file(folder, spec).with_suffix(PARTIAL_SUFFIX)


def read_skipped_rows(folder: Path, spec: FeatureSpec) -> dict[int, Skipped]:
    """The rows of a reading that are empty, since their records were unusable, and why."""
    listed = json.loads(feature_file(folder, spec).with_suffix(".json").read_text(encoding="utf-8"))
    return {row: Skipped(**one) for row, one in listed}


@contextmanager
def _exclusive_cache_access(folder: Path) -> Iterator[None]:
    """Let no other run compute there; what runs that were killed left anywhere in the cache goes."""
    with rank0_lock(folder / LOCK_NAME, "it reads the same records with the same body") as first:
        if not first:
            yield
            return
        for leftover in folder.parent.glob(f"*/*{PARTIAL_SUFFIX}"):
            with suppress(Timeout), FileLock(leftover.parent / LOCK_NAME, blocking=False):
                leftover.unlink(missing_ok=True)
        try:
            yield
        finally:
            for leftover in folder.glob(f"*{PARTIAL_SUFFIX}"):
                leftover.unlink()


class FeatureComputation:
    """One pass of the body over a dataset, of which each rank does a share.

    Args:
        model: the model, whose body is frozen.
        dataset: the samples.
        collate: lays them out.
        args: batch size, workers, devices, precision.
        folder: where it is kept, the same for all ranks.
        specs: what is computed.
        on_skipped: see `computed`.
    """

    def __init__(
        self, model: VLMForPrediction, dataset: HeadDataset, collate: HeadCollator, args: TrainingArguments,
        folder: Path, specs: Sequence[FeatureSpec], on_skipped: Callable[[list[Skipped], int], None],
    ):  # fmt: skip
        self.model, self.dataset, self.collate, self.args = model, dataset, collate, args
        self.folder, self.specs, self.on_skipped = folder, specs, on_skipped
        named = {FeatureSpec.of(head): head.name for head in model.config.settings}
        self.heads = {spec: named[spec] for spec in specs}

    def __call__(self, first: np.ndarray, starts: np.ndarray) -> None:
        """Compute the rows of the samples at places `first`, of which the tokens begin at `starts`."""
        first_rank = self.args.process_index == 0
        if first_rank:
            self._create_partial_files(len(first), int(starts[-1]))
        barrier()
        opened = {spec: self._open_partial_file(spec) for spec in self.specs}
        found = self._compute_shard(opened, first, starts)
        for one in opened.values():
            one.flush()
        skipped = {row: one for part in all_gather_objects(found) for row, one in part.items()}
        self.on_skipped([skipped[row] for row in sorted(skipped)], len(self.dataset))
        if first_rank:
            listed = [[row, asdict(skipped[row])] for row in sorted(skipped)]
            for spec in self.specs:
                whole = feature_file(self.folder, spec)
                whole.with_suffix(".json").write_text(json.dumps(listed), encoding="utf-8")
                partial_feature_file(self.folder, spec).replace(whole)
        barrier()

    def _create_partial_files(self, records: int, tokens: int) -> None:
        """Empty files of their final size.

        Raises:
            ValueError: the disk has no room for them.
        """
        width = self.model.config.get_text_config().hidden_size
        sizes = {spec: tokens if spec.pooling == "tokens" else records for spec in self.specs}
        needed, free = 4 * width * sum(sizes.values()), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{self.folder}: {needed / 2**30:.1f} GiB are needed for what the heads read, and {free / 2**30:.1f} "
                "are free. Set dataset.cache_dir to another disk, choose a pooling that keeps one state a record, or "
                "dataset.cache_features=false"
            )
        for spec, size in sizes.items():
            np.lib.format.open_memmap(partial_feature_file(self.folder, spec), "w+", np.float32, (size, width)).flush()

    def _open_partial_file(self, spec: FeatureSpec) -> np.memmap:
        """The file that rank 0 made, to write to.

        Raises:
            ValueError: this rank does not see it.
        """
        file = partial_feature_file(self.folder, spec)
        if not file.is_file():
            raise ValueError(
                f"{file}: another rank made it, and it is not here; dataset.cache_dir must be a folder that all "
                "machines share, or set dataset.cache_features=false"
            )
        return np.lib.format.open_memmap(file, "r+")

    def _compute_shard(
        self, files: Mapping[FeatureSpec, np.ndarray], first: np.ndarray, starts: np.ndarray
    ) -> dict[int, Skipped]:
        """This rank's share: every so many batches of records of like length."""
        args = self.args
        order = np.argsort(-np.diff(starts), kind="stable")
        size = args.per_device_eval_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        batches = batches[args.process_index :: args.world_size]
        loader = DataLoader(
            _IndexedDataset(self.dataset, first), batch_sampler=[batch.tolist() for batch in batches],
            collate_fn=self._collate_indexed, num_workers=args.dataloader_num_workers,
        )  # fmt: skip
        self.model.to(args.device).eval()  # pyright: ignore[reportArgumentType] - as PyTorch declares it
        skipped: dict[int, Skipped] = {}
        bar = tqdm(loader, "reading prompts and pictures", disable=args.disable_tqdm or args.process_index != 0)
        for rows, skipped_rows, batch in bar:
            self.on_skipped(list(skipped_rows.values()), 0)
            skipped |= skipped_rows
            if rows:
                self._write(files, rows, starts, self._read(batch), batch["attention_mask"])
        return skipped

    @torch.no_grad()
    def _read(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the heads read of a batch."""
        inputs = {name: value.to(self.args.device) for name, value in batch.items() if isinstance(value, Tensor)}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = self.dataset.processor.normalise(inputs["pixel_values"])
        inputs.pop("groups")
        half = torch.bfloat16 if self.args.bf16 else torch.float16
        with torch.autocast(self.args.device.type, half, enabled=self.args.bf16 or self.args.fp16):
            return self.model.features(**inputs)

    def _write(
        self, files: Mapping[FeatureSpec, np.ndarray], rows: list[int], starts: np.ndarray, found: dict[str, Tensor],
        mask: Tensor,
    ) -> None:  # fmt: skip
        """Put what was read of a batch in its places."""
        for spec, file in files.items():
            values = found[self.heads[spec]].float().cpu().numpy()
            if spec.pooling != "tokens":
                file[rows] = values
                continue
            for row, tokens, real in zip(rows, values, mask.bool().numpy(), strict=True):
                file[starts[row] : starts[row + 1]] = tokens[real]

    def _collate_indexed(self, items: list[tuple[int, Any]]) -> tuple[list[int], dict[int, Skipped], dict[str, Any]]:
        """A batch with the rows that it fills, and what was left out of it."""
        rows = [row for row, item in items if not isinstance(item, Skipped)]
        skipped_rows = {row: item for row, item in items if isinstance(item, Skipped)}
        batch = self.collate([item for _, item in items])
        batch.pop(SKIPPED_KEY, None)
        return rows, skipped_rows, batch


class _IndexedDataset(Dataset[Any]):
    """Samples at some places, each with its number."""

    def __init__(self, dataset: HeadDataset, places: np.ndarray):
        self.dataset, self.places = dataset, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> tuple[int, Any]:
        return row, self.dataset[int(self.places[row])]
