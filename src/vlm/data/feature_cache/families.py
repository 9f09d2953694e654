"""Samples of a family's model whose images are not opened: the outputs of a frozen part are read from the cache.

The family's own code still needs the inputs of images: it gets those of blank images of the same sizes, with
`CACHED_FEATURES`. In a pack an item is the images of a sample, since some families read several images otherwise than
one; its details are the shape of each of its tensors.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vlm.data.blank_images import make_blank_medium
from vlm.data.dataset import SampleDataset
from vlm.data.encoding.processor_errors import processor_errors
from vlm.data.feature_cache.images import CachedDataset, CachedImage, find_image, image_cache_keys
from vlm.data.feature_cache.store import Pack
from vlm.data.processor import Processor
from vlm.data.sample import BadSample, MediaSize, Sample
from vlm.data.vision.images import read_media_sizes

CACHED_FEATURES: Final = "cached_features"
"""The input with the numbers of all features of a batch, one after the other: `(numbers,)`."""
CACHED_SHAPES: Final = "cached_shapes"
"""The input with the shapes of the tensors of each sample's features: `(samples, tensors, MAX_DIMS)`, filled with 0."""
MAX_DIMS = 5
"""Most dimensions of such a tensor."""

BLANK_KEY = b"dummy"
"""Stands for the images of the dummy sample of batches without images."""


def sample_cache_key(sample: Sample, processor: Processor) -> bytes:
    """Return a key for the content of a sample's images, in their order (16 bytes).

    Raises:
        BadSample: an image is not there.
    """
    digest = blake2b(digest_size=16)
    for key, _ in image_cache_keys(sample, processor):
        digest.update(key)
    return digest.digest()


def dummy_cache_key() -> bytes:
    """Return the key of the dummy sample."""
    return blake2b(BLANK_KEY, digest_size=16).digest()


class BlankInputs:
    """Inputs of blank images by their sizes; those that were made last are kept."""

    def __init__(self, processor: Processor, most: int = 64):
        self.processor, self.most = processor, most
        self._kept: dict[tuple[MediaSize, ...], Mapping[str, Tensor]] = {}

    def images(self, sample: Sample, sizes: Sequence[MediaSize]) -> Mapping[str, Tensor]:
        """Return the inputs of blank images instead of a sample's own."""
        key = tuple(sizes) if sizes else (None,) * len(sample.media)
        if key not in self._kept:
            if len(self._kept) >= self.most:
                del self._kept[next(iter(self._kept))]
            blanks = [make_blank_medium(self.processor, size) for size in key]
            with processor_errors("the processor", sample.id, sample.media):
                self._kept[key] = self.processor.image_inputs(blanks, sizes)
        return self._kept[key]


class CachedFamilyDataset(CachedDataset):
    """Samples of a family's model with cached features together with the inputs of blank images.

    Args:
        dataset: the samples.
        packs: the features of all their images.
    """

    def __init__(self, dataset: SampleDataset, packs: Sequence[Pack]):
        super().__init__(dataset, packs)
        self.blanks = BlankInputs(dataset.processor)

    def media_inputs(self, sample: Sample) -> tuple[Sequence[MediaSize], dict[str, Tensor]]:
        """Return the sizes of a sample's images, where the processor needs them, and their inputs.

        Raises:
            BadSample: an image did not open when features were computed, or has changed or gone since.
        """
        if not sample.media:
            return (), {}
        sizes = read_media_sizes(sample, self.processor)
        found = find_image(self.packs, sample_cache_key(sample, self.processor))
        if found is None:
            raise BadSample(sample.id, "an image has changed since its features were computed")
        if (skipped := found.pack.skipped.get(found.item)) is not None:
            raise BadSample(sample.id, skipped.reason, skipped.file)
        return sizes, {**self.blanks.images(sample, sizes), **read_features(found)}


def read_features(found: CachedImage) -> dict[str, Tensor]:
    """Return the inputs that hold the features of a sample's images."""
    shapes = torch.from_numpy(np.array(found.pack.details[found.item])).view(1, -1, MAX_DIMS)
    numbers = sum(map(count_numbers, shapes[0].tolist()))
    return {CACHED_FEATURES: found.pack.read(found.item).flatten()[:numbers].clone(), CACHED_SHAPES: shapes}


def count_numbers(shape: Sequence[int]) -> int:
    """Return how many numbers a tensor of this shape has; 0 marks dimensions that are not there."""
    return int(np.prod([size for size in shape if size]))
