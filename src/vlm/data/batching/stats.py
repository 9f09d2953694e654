"""Batch statistics that throughput is computed from, counted where batches are collated."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final

import numpy as np

from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import SampleInputs

BATCH_STATS: Final = "batch_stats"
"""The key of a batch's `BatchStats`; the training loop takes them out."""

ModelInputs = Mapping[str, Any]
"""A batch, or the inputs of one sample: tensors by name, and what the training loop takes out of a batch."""


@dataclass(frozen=True)
class BatchStats:
    """Counts of what a batch holds, without dummy images, padding and records that were left out.

    Attributes:
        samples: number of samples.
        tokens: number of their tokens, image tokens included.
        positions: number of positions of the batch: tokens, padding and dummies.
        supervised: number of supervised tokens.
        images: number of images that the visual encoder reads: images, tiles, frames of videos.
        squared_lengths: sum over samples of the squared number of tokens.
    """

    samples: int = 0
    tokens: int = 0
    positions: int = 0
    supervised: int = 0
    images: int = 0
    squared_lengths: int = 0

    def __add__(self, other: "BatchStats") -> "BatchStats":
        """Add up the statistics of two batches."""
        return BatchStats(*map(operator.add, astuple(self), astuple(other)))


def compute_batch_stats(items: Sequence[SampleInputs], positions: int) -> BatchStats:
    """Compute the statistics of a batch of samples, before dummies are appended to them.

    `positions` is the number of the batch's positions, padding and dummies included.
    """
    lengths = [len(item["input_ids"]) for item in items]
    supervised = [np.asarray(item["labels"])[1:] != IGNORE_INDEX for item in items]  # nothing predicts the first token
    return BatchStats(
        samples=len(items),
        tokens=sum(lengths),
        positions=positions,
        supervised=sum(int(mask.sum()) for mask in supervised),
        images=sum(map(num_images, items)),
        squared_lengths=sum(length * length for length in lengths),
    )


def num_images(inputs: ModelInputs) -> int:
    """Return how many images the visual encoder reads in these inputs of a model.

    Pixels are `(…, 3, height, width)`, features of an encoder `(images, P, V)`; flattened patches come with a grid
    for each image. Where equal images are there once, `image_index` has an entry for each image.
    """
    if (index := inputs.get("image_index")) is not None:
        return len(index)
    if (features := inputs.get("image_features")) is not None:
        return len(features)
    if (grids := inputs.get("image_grids")) is not None:
        return len(grids)
    number = 0
    for pixels_name, grids_name in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        pixels, grids = inputs.get(pixels_name), inputs.get(grids_name)
        if pixels is not None and pixels.ndim >= 4:
            number += math.prod(pixels.shape[:-3])
        elif pixels is not None and grids is not None:
            number += len(grids)
    return number


def num_encoded_and_connected(
    inputs: ModelInputs, images: int, encodes_duplicates: bool, connects_duplicates: bool
) -> tuple[int, int]:
    """Return how many of a batch's images go through the visual encoder, and through the connector.

    Equal images may be in the inputs once; `encodes_duplicates` and `connects_duplicates` say whether they go through
    one by one all the same. `images` is as in `BatchStats`.
    """
    features, distinct = inputs.get("image_features"), images
    if inputs.get("image_index") is not None:
        distinct = len(inputs["pixel_values"] if features is None else features)
    encoded = 0 if features is not None else images if encodes_duplicates else distinct
    return encoded, images if connects_duplicates or encoded == images else distinct
