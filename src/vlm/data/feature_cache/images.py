"""Samples whose images are not opened: the features from a frozen visual encoder are read from files.

Of composed models alone. A pack of image features has one row a view, and as details of an image the number of its
views as `AnyRes.num_views` counts them (0: a video's frame, of one row), its height and its width.
"""

import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlm.data.dataset import SAMPLE_REF, SampleDataset, SampleRef, join_inputs
from vlm.data.feature_cache.store import Pack
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import BadSample, MediaSize, Sample
from vlm.data.skipped import Skipped
from vlm.data.vision.images import wrap_image_errors

BLANK_SIZE = (64, 64)
"""Height and width of a blank image where no image's own size is needed, as `dataset.make_blank_image` has it."""

FRAME_VIEW, SQUARE_VIEW, TILED_VIEW = "frame", "whole", "tiles"
"""How an image is seen: as a frame of a video, as one square, or as a square and its tiles."""


class CachedImage(NamedTuple):
    """A pack, and the index of an image in it."""

    pack: Pack
    item: int

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels; None if no token depends on them."""
        _, height, width = self.pack.details[self.item].tolist()
        return (height, width) if height else None

    @property
    def blank(self) -> tuple[tuple[int, int], str]:
        """Size and kind of the blank image that stands for this one."""
        return self.size or BLANK_SIZE, view_kind(int(self.pack.details[self.item, 0]))


def find_image(packs: Sequence[Pack], key: bytes) -> CachedImage | None:
    """Return an image by its key; None: it is in no pack."""
    for pack in packs:
        if (item := pack.find(key)) is not None:
            return CachedImage(pack, item)
    return None


def require_image(packs: Sequence[Pack], key: bytes) -> CachedImage:
    """Return an image that must be in a pack."""
    image = find_image(packs, key)
    assert image is not None
    return image


def view_kind(num_views: int) -> str:
    """Return the kind of an image, given the number of its views that the encoder reads."""
    return {0: FRAME_VIEW, 1: SQUARE_VIEW}.get(num_views, TILED_VIEW)


def view_kinds(sample: Sample, processor: Processor) -> list[str]:
    """Return the kind of each image of a sample."""
    if (tiling := processor.tiling) is None:
        return [SQUARE_VIEW] * len(sample.images)
    side = (tiling.tile_size, tiling.tile_size)
    sizes = [side if image_ref.frame is None else None for image_ref in sample.images]
    return list(map(view_kind, tiling.num_views(sizes)))


def image_cache_keys(sample: Sample, processor: Processor) -> list[tuple[bytes, str]]:
    """Return for each image of a sample a key for its content and its kind (16 bytes), and its kind.

    A file's path, size and time stand for its content.

    Raises:
        BadSample: there is no such file.
    """
    keys = []
    for image_ref, kind in zip(sample.images, view_kinds(sample, processor), strict=True):
        digest = blake2b(kind.encode(), digest_size=16)
        if image_ref.content is not None:
            digest.update(b"\0" + image_ref.content)
        else:
            assert image_ref.path is not None
            with wrap_image_errors(image_ref, sample.id):
                status = image_ref.path.stat()
            name = f"\1{os.path.abspath(image_ref.path)}\n{status.st_size}\n{status.st_mtime_ns}\n{image_ref.frame}"
            digest.update(name.encode(errors="surrogateescape"))
        keys.append((digest.digest(), kind))
    return keys


def blank_image_cache_key(size: tuple[int, int], kind: str) -> bytes:
    """Return a key for a blank image of this size."""
    return blake2b(f"{kind}\2{size[0]} x {size[1]}".encode(), digest_size=16).digest()


class CachedDataset(SampleDataset):
    """A `SampleDataset` of the same samples, whose `media_inputs` reads features of images instead of the images.

    Args:
        dataset: the samples.
        packs: the features.
    """

    def __init__(self, dataset: SampleDataset, packs: Sequence[Pack]):
        super().__init__(
            dataset.sources,
            dataset.places,
            dataset.lengths,
            dataset.num_images,
            has_videos=dataset.has_videos,
            has_thinking=dataset.has_thinking,
            skipped=dataset.skipped,
            contributions=dataset.contributions,
        )
        self.packs = packs

    def __getitem__(self, index: int) -> SampleInputs | Skipped:
        """Return an encoded sample with the features of its images, or why it cannot be used."""
        number, record = self.places[index].tolist()
        source = self.sources[number]
        try:
            sample = source.sample(record)
            sizes, inputs = self.media_inputs(sample)
            encoded = source.encoder(sample, sizes)
        except BadSample as error:
            return Skipped.from_error(error, source, record)
        ref = SampleRef(source.shown_path, record, sample.id)
        return {**join_inputs(self.processor, encoded, inputs), SAMPLE_REF: ref}


class CachedFeatureDataset(CachedDataset):
    """Samples of a composed model with `image_features` instead of `pixel_values`.

    Args:
        dataset: the samples.
        packs: the features of all their images; for `blank`, of blank images too.
        is_blank: whether every image is blank, as in `BlankImageDataset`.
    """

    def __init__(self, dataset: SampleDataset, packs: Sequence[Pack], *, is_blank: bool = False):
        super().__init__(dataset, packs)
        self.is_blank = is_blank

    def media_inputs(self, sample: Sample) -> tuple[Sequence[MediaSize], dict[str, Tensor]]:
        """Return the sizes of a sample's images, where the processor needs them, and their features.

        Raises:
            BadSample: see `find_cached_images`.
        """
        images = find_cached_images(sample, self.processor, self.packs)
        sizes = [image.size for image in images] if self.processor.needs_image_sizes else []
        if self.is_blank:
            images = [require_image(self.packs, blank_image_cache_key(*image.blank)) for image in images]
        return sizes, make_feature_inputs(images, self.processor)

    def blank(self) -> "CachedFeatureDataset":
        """Return the same samples with blank images."""
        return CachedFeatureDataset(self, self.packs, is_blank=True)


def make_feature_inputs(images: Sequence[CachedImage], processor: Processor) -> dict[str, Tensor]:
    """Return the model's inputs for images; none if there are none."""
    if not images:
        return {}
    inputs = {"image_features": torch.cat([image.pack.read(image.item) for image in images])}
    if processor.needs_image_sizes:
        details = torch.from_numpy(np.stack([image.pack.details[image.item] for image in images]))
        inputs |= {"image_sizes": details[:, 1:], "image_views": details[:, 0]}
    return inputs


def find_cached_images(sample: Sample, processor: Processor, packs: Sequence[Pack]) -> list[CachedImage]:
    """Return a sample's images in the cache.

    Raises:
        BadSample: an image did not open when its features were computed, or has changed or gone since.
    """
    images = []
    for image_ref, (key, _) in zip(sample.images, image_cache_keys(sample, processor), strict=True):
        image = find_image(packs, key)
        if image is None:
            file = None if image_ref.path is None else str(image_ref.path)
            raise BadSample(sample.id, f"image {image_ref} has changed since its features were computed", file)
        if (skipped := image.pack.skipped.get(image.item)) is not None:
            raise BadSample(sample.id, skipped.reason, skipped.file)
        images.append(image)
    return images
