"""A data set of what prediction heads read from a frozen body, stored in files.

A pack holds one kind of features of every record: one row a record, or one a token where heads read every token. The
numbers of its source and of itself are the key of a record.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from vlm.data.batching.collator import SAMPLE_REFS
from vlm.data.cache import json_digest
from vlm.data.dataset import SampleRef
from vlm.data.feature_cache.store import Pack
from vlm.data.heads.dataset import HeadDataset
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.poolings import EVERY_TOKEN_POOLINGS


def pack_name(head: HeadSettings) -> str:
    """Return the name of the pack that a head reads: heads share one if they read the same hidden states."""
    pooling = "tokens" if head.pooling in EVERY_TOKEN_POOLINGS else head.pooling
    return json_digest(pooling, head.layer, head.token_id)


class HeadFeatureItem(TypedDict):
    """A sample: features `(D,)` or `(T, D)` and targets `(width,)` by head, its group (`HeadDataset`), its name."""

    features: dict[str, Tensor]
    targets: dict[str, np.ndarray]
    group: int
    sample_ref: SampleRef


class HeadFeatureBatch(TypedDict, total=False):
    """Samples, with the names that the model's `forward` gives its arguments.

    Attributes:
        features: head -> `(samples, D)`, or `(samples, T, D)`.
        labels: head -> `(samples, width)`, the targets.
        groups: `(samples,)`.
        attention_mask: `(samples, T)`: 1 at real tokens, where every token is read.
        sample_refs: which samples these are; the training loop takes them out.
    """

    features: dict[str, Tensor]
    labels: dict[str, Tensor]
    groups: Tensor
    attention_mask: Tensor
    sample_refs: list[SampleRef]


class HeadFeatureDataset(Dataset[HeadFeatureItem]):
    """A `HeadDataset` with features instead of images and prompts.

    Args:
        dataset: the samples.
        packs: head -> what it reads of all of them; all packs hold the same records in the same order.
        heads: the model's.

    Attributes:
        group_indices: `(samples,)`: equal where a ranking compares samples, negative where it compares with no other.
    """

    def __init__(self, dataset: HeadDataset, packs: Mapping[str, Pack], heads: Sequence[HeadSettings]):
        keys = next(iter(packs.values())).keys.tolist()
        indices = {tuple(key): index for index, key in enumerate(keys)}
        items = np.array([indices[tuple(place)] for place in dataset.dataset.places.tolist()])
        usable = np.flatnonzero(~np.isin(items, [item for pack in packs.values() for item in pack.skipped]))
        samples = dataset if len(usable) == len(items) else dataset.subset(usable)
        self.items, self.packs, self.group_indices = items[usable], packs, samples.group_indices
        self.token_heads = {head.name for head in heads if head.pooling in EVERY_TOKEN_POOLINGS}
        self.refs = [
            SampleRef(samples.dataset.sources[source].shown_path, record, "?")
            for source, record in samples.dataset.places.tolist()
        ]
        self.targets = {head.name: samples.targets(head.name).astype(np.float32) for head in heads}

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.items)

    def __getitem__(self, index: int) -> HeadFeatureItem:
        """Return the features that heads read of a sample, its targets and its group."""
        rows = {name: pack.read(self.items[index])[:, 0] for name, pack in self.packs.items()}
        return {
            "features": {name: states if name in self.token_heads else states[0] for name, states in rows.items()},
            "targets": {name: values[index] for name, values in self.targets.items()},
            "group": int(self.group_indices[index]),
            "sample_ref": self.refs[index],
        }


def collate_features(items: Sequence[HeadFeatureItem]) -> HeadFeatureBatch:
    """Put `HeadFeatureDataset` items into a batch, padded where every token is read."""
    batch: HeadFeatureBatch = {"features": {}}
    for name, first in items[0]["features"].items():
        features = [item["features"][name] for item in items]
        if first.ndim == 2:
            ones = [torch.ones(len(tokens), dtype=torch.int64) for tokens in features]
            batch["attention_mask"] = pad_sequence(ones, batch_first=True)
        batch["features"][name] = pad_sequence(features, batch_first=True)
    batch["labels"] = default_collate([item["targets"] for item in items])
    batch["groups"] = torch.tensor([item["group"] for item in items])
    batch[SAMPLE_REFS] = [item["sample_ref"] for item in items]
    return batch
