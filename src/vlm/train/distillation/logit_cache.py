"""What is kept of a teacher's logits, as packs: each record once, for further epochs and runs.

A store is named by all that these depend on: the records and how they become tokens, the teacher's weights, processor
and precision, the code that computes them, and how many tokens are kept at which temperature.
"""

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm.config.dataset_schema import DatasetConfig
from vlm.config.distillation_schema import DistillationConfig
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.dataset import SampleDataset
from vlm.data.feature_cache.store import FeatureFormat, FeatureStore, Pack, PackPlan
from vlm.data.progress import show_progress
from vlm.data.sample import BadSample
from vlm.data.skipped import Skipped
from vlm.models import text_loss
from vlm.train.distillation import divergences
from vlm.train.distillation.data import TeacherDataset, encode_labels, supervised_ids
from vlm.train.distillation.divergences import encode_rows, row_bytes
from vlm.train.distillation.teacher import Teacher
from vlm.train.feature_cache.fingerprints import code_digest, records_digest
from vlm.train.feature_cache.images import refuse_unless_skipped
from vlm.train.feature_cache.writer import FeatureCacheWriter, ItemFeatures, PacksAndPlans

log = logging.getLogger(__name__)

BYTES_PER_PACK = 2**30
"""About so many bytes are in a pack: a run that is stopped while it computes loses those of the last pack."""

ADVICE = "Set dataset.cache_dir to another disk, or lower trainer.distillation.top_k"

TeacherBatch = tuple[list[int], dict[str, Tensor]]
"""Indices of the records in a batch, and the teacher's inputs."""


class SupervisedCounts(Dataset[int | Skipped]):
    """The number of supervised tokens of records; no image is decoded."""

    def __init__(self, dataset: SampleDataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.indices)

    def __getitem__(self, place: int) -> int | Skipped:
        """Return the number of supervised tokens of a record, or why it cannot be used."""
        index = self.indices[place]
        try:
            return len(supervised_ids(encode_labels(self.dataset, index)))
        except BadSample as error:
            source, record = self.dataset.places[index].tolist()
            return Skipped.from_error(error, self.dataset.sources[source], record)


class TeacherLogitWriter(FeatureCacheWriter[int, TeacherBatch]):
    """Runs a teacher over a data set; an item is the index of a record's first sample.

    Args:
        teacher: the teacher; its weights are loaded where anything has to be computed.
        dataset: the samples, with their images.
        vocabulary: number of ids that both models have logits of.
        options: `trainer.distillation`.
        config: `dataset`.
    """

    description = "asking the teacher"
    reason = "it needs the logits of the same teacher for the same records"

    def __init__(
        self,
        teacher: Teacher,
        dataset: SampleDataset,
        vocabulary: int,
        options: DistillationConfig,
        config: DatasetConfig,
    ):
        self.teacher, self.dataset, self.vocabulary, self.options = teacher, dataset, vocabulary, options
        self.args, self.on_skipped = teacher.args, partial(refuse_unless_skipped, config)
        self.items, self.collate = TeacherDataset(dataset, teacher, config), teacher.make_collator()
        self.places, self.first = np.unique(dataset.places, axis=0, return_index=True)
        root, encoders = resolve_cache_folder(config.cache_dir), [source.encoder for source in dataset.sources]
        records = records_digest(dataset, self.first), [(encoder.longest, encoder.truncate) for encoder in encoders]
        kept = options.top_k, options.temperature, vocabulary, inspect.getsource(divergences)
        name = json_digest(records, teacher.fingerprint(root), kept, code_digest(type(self)), code_digest(Teacher))
        content = f"trainer.distillation.top_k={options.top_k}: the teacher's logits"
        self.store = FeatureStore(root / "teacher_logits" / name, math.inf, content, ADVICE)

    def open_packs(self) -> list[Pack]:
        """Return the packs of all records: out of the cache, or computed now by all ranks.

        Raises:
            ValueError: there is no room for them, other ranks see another disk, or records may not be skipped.
        """
        return self.open(self._find_packs)

    def _find_packs(self) -> PacksAndPlans[int]:
        packs = self.store.open_packs()
        held = {tuple(key) for pack in packs for key in pack.keys.tolist()}
        missing = [i for i, place in enumerate(self.places.astype(np.uint64).tolist()) if tuple(place) not in held]
        if not missing:
            log.info("The teacher's logits for %s records are cached in %s", f"{len(self.first):,}", self.store.folder)
            return packs, []
        return packs, [[plan] for plan in self._plan_packs(np.array(missing))]

    def _plan_packs(self, missing: np.ndarray) -> list[PackPlan[int]]:
        """Distribute records over packs."""
        indices = self.first[missing]
        counts, skipped = self._count(indices.tolist())
        num_bytes = row_bytes(self.options.top_k, self.vocabulary)
        total = int(counts.sum()) * num_bytes
        log.info("Computing the teacher's logits for %s tokens (%.3g GB)", f"{int(counts.sum()):,}", total / 1e9)
        groups = (counts.cumsum() * num_bytes - 1) // BYTES_PER_PACK
        row_format = FeatureFormat("uint8", tokens=1, width=num_bytes, stride=num_bytes)
        plans = []
        for group in np.unique(groups).tolist():
            chosen = np.flatnonzero(groups == group)
            keys = self.places[missing[chosen]].astype(np.uint64)
            own = {place: skipped[item] for place, item in enumerate(chosen.tolist()) if item in skipped}
            details = np.zeros((len(chosen), 0), dtype=np.int64)
            name = json_digest(keys.tolist())
            plans.append(PackPlan(name, row_format, indices[chosen].tolist(), keys, counts[chosen], details, own))
        return plans

    def _count(self, indices: list[int]) -> tuple[np.ndarray, dict[int, Skipped]]:
        """Return the number of supervised tokens of records, at least a row each, and those that cannot be used."""
        counts, skipped = np.ones(len(indices), dtype=np.int64), {}
        workers = self.args.dataloader_num_workers
        loader = DataLoader(SupervisedCounts(self.dataset, indices), batch_size=None, num_workers=workers)
        for place, count in enumerate(
            show_progress(loader, "counting supervised tokens", silent=self.args.process_index > 0)
        ):
            if isinstance(count, Skipped):
                skipped[place] = count
                self.on_skipped([count], 0)
            else:
                counts[place] = count
        return counts, skipped

    def batches(self, plan: PackPlan[int]) -> list[list[int]]:
        """Return batches of like length."""
        usable = np.array([i for i in range(len(plan.items)) if i not in plan.skipped], dtype=np.int64)
        lengths = self.dataset.lengths[np.array(plan.items)[usable]].astype(np.int64)
        order = usable[np.argsort(-lengths, kind="stable")].tolist()
        size = self.args.per_device_eval_batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def load(self, plan: PackPlan[int], indices: list[int]) -> tuple[dict[int, Skipped], TeacherBatch]:
        """Return the teacher's inputs of a batch."""
        samples = {index: self.items[plan.items[index]] for index in indices}
        skipped = {index: sample for index, sample in samples.items() if isinstance(sample, Skipped)}
        batch = self.collate([sample for sample in samples.values() if not isinstance(sample, Skipped)])
        inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        return skipped, ([index for index in indices if index not in skipped], inputs)

    def compute(self, plans: list[PackPlan[int]], batch: TeacherBatch) -> Iterator[tuple[int, ItemFeatures]]:
        """Ask the teacher about a batch, and keep what it says at supervised positions."""
        records, inputs = batch
        if not records:
            return
        read = self.teacher.read(self.teacher.to_device(inputs), self.vocabulary)
        rows = torch.cat([self._encode(read.head(chunk)) for chunk in self._chunks(read.states)]).cpu()
        (plan,) = plans
        for record, own in zip(records, rows.split(plan.counts[records].tolist()), strict=True):
            yield record, [own[:, None]]

    def _chunks(self, states: Tensor) -> Sequence[Tensor]:
        """Return states of so many positions at a time that their logits fit into memory."""
        return states.split(max(text_loss.MAX_LOGITS // self.vocabulary, 1))

    def _encode(self, logits: Tensor) -> Tensor:
        return encode_rows(logits[:, : self.vocabulary], self.options.top_k, self.options.temperature)
