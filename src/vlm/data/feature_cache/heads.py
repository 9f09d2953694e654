"""What prediction heads read of a frozen body, as a data set that is read from files.

A pack holds one kind of features of every record: one row a record, or one a token where heads read every token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from vlm.data.cache import json_digest
from vlm.data.feature_cache.store import Pack
from vlm.data.heads.dataset import HeadDataset
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.poolings import EVERY_TOKEN_POOLINGS


@dataclass(frozen=True)
class FeatureSpec:
    """Which hidden states are read.

    Attributes:
        pooling: a pooling without weights of its own, or `tokens`: every token's.
        layer: index into `hidden_states`; None: the last.
        token_id: the token at which a pooling reads, if it reads at one.
    """

    pooling: str
    layer: int | None
    token_id: int | None

    @classmethod
    def from_head(cls, head: HeadSettings) -> "FeatureSpec":
        """Return what a head reads."""
        pooling = "tokens" if head.pooling in EVERY_TOKEN_POOLINGS else head.pooling
        return cls(pooling, head.layer, head.token_id)

    @property
    def name(self) -> str:
        """The name of its packs."""
        return json_digest(self.pooling, self.layer, self.token_id)


HeadFeatures = Mapping[FeatureSpec, Pack]
"""Packs that hold the same records in the same order: key of a record are the numbers of its source and of itself."""


class HeadFeatureItem(TypedDict):
    """A sample: features `(D,)` or `(T, D)` and targets `(width,)` by head, and its `HeadDataset.group_indices`."""

    features: dict[str, Tensor]
    targets: dict[str, np.ndarray]
    group: int


class HeadFeatureBatch(TypedDict, total=False):
    """Samples, with the names that the model's `forward` gives its arguments.

    Attributes:
        features: head -> `(samples, D)`, or `(samples, T, D)`.
        labels: head -> `(samples, width)`, the targets.
        groups: `(samples,)`.
        attention_mask: `(samples, T)`: 1 at real tokens, where every token is read.
    """

    features: dict[str, Tensor]
    labels: dict[str, Tensor]
    groups: Tensor
    attention_mask: Tensor


class HeadFeatureDataset(Dataset[HeadFeatureItem]):
    """A `HeadDataset` with features in place of images and prompts.

    Args:
        dataset: the samples.
        features: of all of them.
        heads: the model's.
    """

    def __init__(self, dataset: HeadDataset, features: HeadFeatures, heads: Sequence[HeadSettings]):
        packs = list(features.values())
        indices = {(source, record): index for index, (source, record) in enumerate(packs[0].keys.tolist())}
        items = np.array([indices[source, record] for source, record in dataset.dataset.places.tolist()])
        usable = np.flatnonzero(~np.isin(items, [item for pack in packs for item in pack.skipped]))
        self.samples = dataset if len(usable) == len(items) else dataset.subset(usable)
        self.items = items[usable]
        self.packs = {head.name: features[FeatureSpec.from_head(head)] for head in heads}
        self.reads_tokens = {head.name: head.pooling in EVERY_TOKEN_POOLINGS for head in heads}
        self.targets = {head.name: self.samples.targets(head.name).astype(np.float32) for head in heads}

    @property
    def group_indices(self) -> np.ndarray:
        """`(samples,)`: equal where a ranking compares samples, negative where it compares with no other."""
        return self.samples.group_indices

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> HeadFeatureItem:
        features = {name: pack.read(self.items[index])[:, 0] for name, pack in self.packs.items()}
        return {
            "features": {name: rows if self.reads_tokens[name] else rows[0] for name, rows in features.items()},
            "targets": {name: values[index] for name, values in self.targets.items()},
            "group": int(self.samples.group_indices[index]),
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
    names = items[0]["targets"]
    batch["labels"] = {name: torch.from_numpy(np.stack([item["targets"][name] for item in items])) for name in names}
    batch["groups"] = torch.tensor([item["group"] for item in items])
    return batch
