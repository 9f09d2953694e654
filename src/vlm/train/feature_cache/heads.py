"""What prediction heads read of a frozen body, as packs: each record once, for further epochs and other heads.

A store is named by all that hidden states depend on: the records and how they become tokens, their images, every weight
of the body, and the code and precision that compute them.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

from vlm.assembly.model_kinds import is_prediction_model
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.feature_cache.heads import HeadFeatureDataset, pack_name
from vlm.data.feature_cache.store import FeatureFormat, FeatureStore, Pack, PackPlan
from vlm.data.heads.dataset import BlankHeadDataset, HeadCollator, HeadDataset
from vlm.data.skipped import Skipped
from vlm.models import VLMForPrediction
from vlm.models.poolings import EVERY_TOKEN_POOLINGS
from vlm.train.feature_cache.fingerprints import body_digest, code_digest, records_digest
from vlm.train.feature_cache.writer import FeatureCacheWriter, ItemFeatures, PacksAndPlans
from vlm.train.objectives.base import PreparedRun
from vlm.train.run_directory import SkippedRecords

log = logging.getLogger(__name__)

ADVICE = (
    "Set dataset.cache_dir to another disk, choose a pooling that keeps one state per record, or "
    "dataset.cache_features=false"
)

RecordBatch = tuple[list[int], dict[str, Tensor]]
"""Indices of the records in a batch, and the tensors of the batch."""


def make_feature_reader(
    run: PreparedRun, config: DatasetConfig, datasets: Sequence[HeadDataset], collate: HeadCollator
) -> Callable[[HeadDataset], HeadFeatureDataset]:
    """Return what gives the features of samples; all of the records are computed now, blank images when asked for.

    The data sets have all records of the run, before any are held out; `collate` makes batches for the body.
    """
    model, args = run.model, run.args
    assert is_prediction_model(model)
    on_skipped = SkippedRecords(run, config, 1, is_writer=args.process_index == 0)
    root = resolve_cache_folder(config.cache_dir) / "features"
    body = body_digest(model)  # of a large body it takes a while

    def open_features(dataset: HeadDataset) -> dict[str, Pack]:
        """Open the features of a data set; compute those that are not cached."""
        return HeadFeatureWriter(model, body, dataset, collate, args, root, on_skipped).open_features()

    packs = {id(dataset.dataset.sources[0]): open_features(dataset) for dataset in datasets}

    def read(dataset: HeadDataset) -> HeadFeatureDataset:
        """Return a data set with features in place of images and texts."""
        if isinstance(dataset, BlankHeadDataset):
            features = open_features(dataset)
        else:
            features = packs[id(dataset.dataset.sources[0])]  # what is held out has the same sources
        return HeadFeatureDataset(dataset, features, model.config.settings)

    return read


def disable_workers(args: TrainingArguments) -> TrainingArguments:
    """Return the arguments for rows that lie in memory: workers would take longer to start than to read them."""
    args = copy.copy(args)
    args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None
    args.dataloader_persistent_workers = False
    return args


class HeadFeatureWriter(FeatureCacheWriter[int, RecordBatch]):
    """Runs a frozen body, fingerprinted as `body`, over a dataset; an item is the index of a record's first sample."""

    description = "reading prompts and images"
    reason = "it reads the same records with the same model"

    def __init__(
        self,
        model: VLMForPrediction,
        body: str,
        dataset: HeadDataset,
        collate: HeadCollator,
        args: TrainingArguments,
        root: Path,
        on_skipped: Callable[[list[Skipped], int], None],
    ):
        self.model, self.dataset, self.collate, self.args, self.on_skipped = model, dataset, collate, args, on_skipped
        self.places, self.first = np.unique(dataset.dataset.places, axis=0, return_index=True)
        precision, code = (str(model.dtype), args.bf16, args.fp16), code_digest(type(self))
        name = json_digest(records_digest(dataset.dataset, self.first), dataset.shown_images, body, precision, code)
        self.store = FeatureStore(root / name, math.inf, "the features that the heads read", ADVICE)
        self.heads = {pack_name(head): head for head in model.config.settings}

    def open_features(self) -> dict[str, Pack]:
        """Return head -> what it reads: out of the cache, or computed now by all ranks.

        Raises:
            ValueError: there is no room for the features, other ranks see another disk, or records may not be skipped.
        """
        packs = {pack.folder.name: pack for pack in self.open(self._find_packs)}
        skipped = {item: record for pack in packs.values() for item, record in pack.skipped.items()}
        self.on_skipped([record for _, record in sorted(skipped.items())], len(self.dataset))
        return {head.name: packs[pack_name(head)] for head in self.model.config.settings}

    def _find_packs(self) -> PacksAndPlans[int]:
        """Return the packs that the heads read, and those to write."""
        packs = {pack.folder.name: pack for pack in self.store.open_packs() if pack.folder.name in self.heads}
        missing = [self._plan(name) for name in self.heads if name not in packs]
        if not missing:
            log.info(
                "The hidden states that heads read are cached for %s records in %s",
                f"{len(self.first):,}",
                self.store.folder,
            )
        return list(packs.values()), [missing] if missing else []

    def _plan(self, name: str) -> PackPlan[int]:
        width = self.model.config.get_text_config().hidden_size
        lengths = self.dataset.lengths[self.first]
        reads_tokens = self.heads[name].pooling in EVERY_TOKEN_POOLINGS
        counts = lengths.astype(np.int64) if reads_tokens else np.ones(len(lengths), dtype=np.int64)
        row_format = FeatureFormat("float32", tokens=1, width=width, stride=4 * width)
        no_details = np.zeros((len(counts), 0), dtype=np.int64)
        keys = self.places.astype(np.uint64)
        return PackPlan(name, row_format, self.first.tolist(), keys, counts, no_details, {})

    def batches(self, plan: PackPlan[int]) -> list[list[int]]:
        """Return batches of like length; the body is set to evaluate, on this rank's device."""
        self.model.to(self.args.device).eval()  # pyright: ignore[reportArgumentType] - as PyTorch declares it
        order = np.argsort(-self.dataset.lengths[plan.items].astype(np.int64), kind="stable").tolist()
        size = self.args.per_device_eval_batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def load(self, plan: PackPlan[int], indices: list[int]) -> tuple[dict[int, Skipped], RecordBatch]:
        """Return the tensors that the body reads."""
        samples = {index: self.dataset[plan.items[index]] for index in indices}
        skipped = {index: sample for index, sample in samples.items() if isinstance(sample, Skipped)}
        batch = self.collate(list(samples.values()))
        inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "groups"}
        return skipped, ([index for index in indices if index not in skipped], inputs)

    def compute(self, plans: list[PackPlan[int]], batch: RecordBatch) -> Iterator[tuple[int, ItemFeatures]]:
        """Run the body on a batch."""
        records, inputs = batch
        if not records:
            return
        states = self._read(inputs)
        mask = inputs["attention_mask"].bool()
        by_pack = [states[self.heads[plan.name].name].float().cpu() for plan in plans]
        for row, record in enumerate(records):
            features = [rows[row][mask[row]] if rows.ndim == 3 else rows[row][None] for rows in by_pack]
            yield record, [values[:, None] for values in features]

    @torch.no_grad()
    def _read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the heads read of a batch: head -> `(B, D)`, or `(B, T, D)` where every token is read."""
        inputs = {name: value.to(self.args.device) for name, value in batch.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = self.dataset.processor.normalise(inputs["pixel_values"])
        half = torch.bfloat16 if self.args.bf16 else torch.float16
        with torch.autocast(self.args.device.type, half, enabled=self.args.bf16 or self.args.fp16):
            return self.model.features(**inputs)
