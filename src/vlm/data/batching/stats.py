"""What a batch is: numbers that the speed of a run is told from, counted where batches are laid out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final

import numpy as np

from vlm.data.encoding.labels import IGNORE_INDEX

BATCH_STATS: Final = "batch_stats"
"""The key of a batch under which its `BatchStats` stand; the training loop takes them out."""


@dataclass(frozen=True)
class BatchStats:
    """What a batch holds; dummy images, padding and records that were left out are no part of it.

    Attributes:
        samples: its samples.
        tokens: their tokens, image tokens counted.
        positions: those of the batch: its tokens, padding and dummies.
        supervised: the tokens that are learnt.
        images: what the visual encoder reads as one image: pictures, their tiles, frames of videos.
        squares: the sum over samples of their length squared.
    """

    samples: int = 0
    tokens: int = 0
    positions: int = 0
    supervised: int = 0
    images: int = 0
    squared_lengths: int = 0

    def __add__(self, other: "BatchStats") -> "BatchStats":
        """Those of two batches."""
        return BatchStats(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


def compute_batch_stats(items: Sequence[Mapping[str, Any]], positions: int) -> BatchStats:
    """What a batch of these samples holds, before anything is appended to them.

    Args:
        items: with `input_ids`, `labels` and inputs of their images, as data workers hand them on.
        positions: those of the batch, padding and dummies included.
    """
    lengths = [len(item["input_ids"]) for item in items]
    learnt = [np.asarray(item["labels"])[1:] != IGNORE_INDEX for item in items]  # nothing predicts the first token
    return BatchStats(
        samples=len(items),
        tokens=sum(lengths),
        positions=positions,
        supervised=sum(int(one.sum()) for one in learnt),
        images=sum(map(num_images, items)),
        squared_lengths=sum(length * length for length in lengths),
    )


def num_images(inputs: Mapping[str, Any]) -> int:
    """How many images the visual encoder reads in these inputs of a model.

    Pixels are `(…, 3, height, width)`, features of an encoder `(images, P, V)`; loose patches have a grid for each
    image. Where each image stands once, `image_index` says how often.
    """
    if (index := inputs.get("image_index")) is not None:
        return len(index)
    if (features := inputs.get("image_features")) is not None:
        return len(features)
    named = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    return sum(_count_images(inputs.get(pixels), inputs.get(grids)) for pixels, grids in named)


def _count_images(pixels: Any, grids: Any) -> int:
    if pixels is None:
        return 0
    if pixels.ndim < 4:
        return 0 if grids is None else len(grids)
    return math.prod(pixels.shape[:-3])


def num_encoded_and_connected(
    inputs: Mapping[str, Any], images: int, encodes_duplicates: bool, connects_duplicates: bool
) -> tuple[int, int]:
    """How many of a batch's images the visual encoder reads, and the connector.

    Args:
        inputs: of a model; equal images may stand in them once.
        images: see `BatchStats`.
        encodes_duplicates: whether the encoder reads equal images one by one all the same.
        connects_duplicates: whether the connector does.
    """
    features, distinct = inputs.get("image_features"), images
    if inputs.get("image_index") is not None:
        distinct = len(inputs["pixel_values"] if features is None else features)
    encoded = 0 if features is not None else images if encodes_duplicates else distinct
    return encoded, images if connects_duplicates or encoded == images else distinct
