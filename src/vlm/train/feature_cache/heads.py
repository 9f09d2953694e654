"""What prediction heads read of a frozen body, as packs: each record once, for further epochs and other heads.

A store is named by all that hidden states depend on: the records and how they become tokens, their images, every weight
of the body, and the code and precision that compute them.
"""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, StackDataset, Subset
from transformers import TrainingArguments

from vlm.data.cache import json_digest
from vlm.data.dataset import Skipped
from vlm.data.feature_cache.heads import FeatureSpec, HeadFeatures
from vlm.data.feature_cache.store import FeatureFormat, FeatureStore, Pack, PackPlan
from vlm.data.heads.dataset import HeadCollator, HeadDataset
from vlm.models import VLMForPrediction
from vlm.train.feature_cache.fingerprints import code_digest, records_digest
from vlm.train.feature_cache.writer import FeatureCacheWriter, ItemFeatures

log = logging.getLogger(__name__)

ADVICE = (
    "Set dataset.cache_dir to another disk, choose a pooling that keeps one state a record, or "
    "dataset.cache_features=false"
)

RecordBatch = tuple[list[int], dict[int, Skipped], dict[str, Tensor]]
"""Numbers of the records in a batch, the records that were left out of it, and the tensors of the batch."""


def load_or_compute_features(
    model: VLMForPrediction, body: str, dataset: HeadDataset, collate: HeadCollator, args: TrainingArguments,
    cache: Path, on_skipped: Callable[[list[Skipped], int], None] = lambda skipped, number: None,
) -> HeadFeatures:  # fmt: skip
    """Return what the model's heads read of a dataset: out of the cache, or computed now by all ranks.

    Args:
        model: the model, whose body is frozen.
        body: see `fingerprints.body_digest`; of a large body it takes a while.
        dataset: the samples.
        collate: the run's.
        args: batch size, workers, devices, precision.
        cache: the cache's folder.
        on_skipped: called with the records that turn out to be unusable, and the number of records, before a pack is
            whole; it may refuse them.

    Raises:
        ValueError: there is no room for the features, or other ranks see another disk.
    """
    samples = dataset.dataset
    places, first = np.unique(samples.places, axis=0, return_index=True)
    precision, code = (str(model.dtype), args.bf16, args.fp16), code_digest(HeadFeatureWriter)
    name = json_digest(records_digest(samples, first), dataset.shown_images, body, precision, code)
    store = FeatureStore(cache / "features" / name, math.inf, "the features that the heads read", ADVICE)
    writer = HeadFeatureWriter(store, model, dataset, collate, args, on_skipped)
    specs = {spec.name: spec for spec in map(FeatureSpec.from_head, model.config.settings)}

    def find_packs() -> tuple[list[Pack], list[list[PackPlan[int]]]]:
        packs = [pack for pack in store.open_packs() if pack.folder.name in specs]
        missing = [spec for name, spec in specs.items() if name not in {pack.folder.name for pack in packs}]
        if missing:
            return packs, [[writer.plan(spec, places, first) for spec in missing]]
        log.info("What the heads read of %s records is in the cache: %s", f"{len(first):,}", store.folder)
        return packs, []

    packs = {specs[pack.folder.name]: pack for pack in writer.open(find_packs)}
    skipped = {item: record for pack in packs.values() for item, record in pack.skipped.items()}
    on_skipped([record for _, record in sorted(skipped.items())], len(dataset))
    return packs


class HeadFeatureWriter(FeatureCacheWriter[int, RecordBatch]):
    """Runs the body over a dataset; an item is the index of a sample.

    Args:
        store: where the packs are.
        model: the model, whose body is frozen.
        dataset: the samples.
        collate: the run's.
        args: batch size, workers, devices, precision.
        on_skipped: see `load_or_compute_features`.
    """

    description = "reading prompts and images"
    reason = "it reads the same records with the same body"

    def __init__(
        self, store: FeatureStore, model: VLMForPrediction, dataset: HeadDataset, collate: HeadCollator,
        args: TrainingArguments, on_skipped: Callable[[list[Skipped], int], None],
    ):  # fmt: skip
        self.store, self.model, self.dataset, self.args, self.on_skipped = store, model, dataset, args, on_skipped
        self.collate_samples = collate
        self.heads = {FeatureSpec.from_head(head).name: head.name for head in model.config.settings}

    def plan(self, spec: FeatureSpec, places: np.ndarray, first: np.ndarray) -> PackPlan[int]:
        """Return the pack of what is read of the records at `places`, the first samples of which are at `first`."""
        width = self.model.config.get_text_config().hidden_size
        lengths = self.dataset.lengths[first].astype(np.int64)
        counts = lengths if spec.pooling == "tokens" else np.ones_like(lengths)
        row_format = FeatureFormat("float32", tokens=1, width=width, stride=4 * width)
        no_details = np.zeros((len(first), 0), dtype=np.int64)
        return PackPlan(spec.name, row_format, first.tolist(), places.astype(np.uint64), counts, no_details, {})

    def load(self, plan: PackPlan[int]) -> tuple[Dataset[object], list[list[int]]]:
        """Return numbered samples, in batches of like length."""
        order = np.argsort(-self.dataset.lengths[plan.items].astype(np.int64), kind="stable").tolist()
        size = self.args.per_device_eval_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        self.model.to(self.args.device).eval()  # pyright: ignore[reportArgumentType] - as PyTorch declares it
        numbers: Any = range(len(order))
        return StackDataset(numbers, Subset(self.dataset, plan.items)), batches

    def collate(self, samples: list[tuple[int, Any]]) -> RecordBatch:
        """Put numbered samples into a batch."""
        skipped = {number: sample for number, sample in samples if isinstance(sample, Skipped)}
        batch = self.collate_samples([sample for _, sample in samples])
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        return [number for number, _ in samples if number not in skipped], skipped, tensors

    def compute(self, plans: list[PackPlan[int]], batch: RecordBatch) -> Iterator[tuple[int, ItemFeatures | Skipped]]:
        """Run the body on a batch."""
        records, skipped, inputs = batch
        self.on_skipped(list(skipped.values()), 0)
        yield from skipped.items()
        if not records:
            return
        states = self._read(inputs)
        mask = inputs["attention_mask"].bool()
        by_pack = [states[self.heads[plan.name]].float().cpu() for plan in plans]
        for row, record in enumerate(records):
            features = [rows[row][mask[row]] if rows.ndim == 3 else rows[row][None] for rows in by_pack]
            yield record, [values[:, None] for values in features]

    def check_skipped(self, skipped: list[Skipped]) -> None:
        """Hand on the records that turned out to be unusable."""
        self.on_skipped(skipped, 0)

    @torch.no_grad()
    def _read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the heads read of a batch: head -> `(B, D)`, or `(B, T, D)` where every token is read."""
        inputs = {name: value.to(self.args.device) for name, value in batch.items() if name != "groups"}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = self.dataset.processor.normalise(inputs["pixel_values"])
        half = torch.bfloat16 if self.args.bf16 else torch.float16
        with torch.autocast(self.args.device.type, half, enabled=self.args.bf16 or self.args.fp16):
            return self.model.features(**inputs)
