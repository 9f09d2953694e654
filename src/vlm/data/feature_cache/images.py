"""Samples of which no image is opened: the features that a frozen visual encoder gives for each are read from files.

Of composed models alone. A pack of image features has one row a view, and as details of an image the number of its
views as `AnyRes.num_views` counts them (0: a video's frame, of one row), its height and its width.
"""

import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.data.dataset import SampleDataset, Skipped
from vlm.data.encoding.labels import Encoded
from vlm.data.feature_cache.store import Pack
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import BadSample, ImageRef, MediaSize, Sample, VideoRef

BLANK_SIZE = (64, 64)
"""Height and width of a blank image where no image's own size is needed, as `dataset.make_blank_image` has it."""

FRAME_VIEW, SQUARE_VIEW, TILED_VIEW = "frame", "whole", "tiles"
"""How an image is seen: as a frame of a video, as one square, or as a square and its tiles."""


class CachedImage(NamedTuple):
    """A pack, and the index of an image in it."""

    pack: Pack
    item: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; 0 where no token depends on them."""
        _, height, width = self.pack.details[self.item].tolist()
        return height, width


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


def view_kinds(sample: Sample, processor: Processor) -> list[str]:
    """Return how each image of a sample is seen."""
    tiling = processor.tiling
    if tiling is None:
        return [SQUARE_VIEW] * len(sample.media)
    side = (tiling.tile_size, tiling.tile_size)
    views = tiling.num_views([None if is_video_frame(image) else side for image in sample.media])
    return [{0: FRAME_VIEW, 1: SQUARE_VIEW}.get(number, TILED_VIEW) for number in views]


def is_video_frame(medium: ImageRef | VideoRef) -> bool:
    """Return whether an image stands for a part of a video."""
    return isinstance(medium, ImageRef) and medium.frame is not None


def image_cache_key(image_ref: ImageRef, kind: str) -> bytes:
    """Return a key for an image's content and how it is seen: 16 bytes. A file's path, size and time stand for it.

    Raises:
        OSError: there is no such file.
    """
    digest = blake2b(kind.encode(), digest_size=16)
    if image_ref.content is not None:
        digest.update(b"\0" + image_ref.content)
    else:
        assert image_ref.path is not None
        status = image_ref.path.stat()
        name = f"\1{os.path.abspath(image_ref.path)}\n{status.st_size}\n{status.st_mtime_ns}\n{image_ref.frame}"
        digest.update(name.encode(errors="surrogateescape"))
    return digest.digest()


def blank_image_cache_key(size: tuple[int, int], kind: str) -> bytes:
    """Return a key for a blank image of this size."""
    return blake2b(f"{kind}\2{size[0]} x {size[1]}".encode(), digest_size=16).digest()


class CachedFeatureDataset(SampleDataset):
    """A `SampleDataset` with `image_features` in place of `pixel_values`.

    Args:
        dataset: the samples.
        packs: the features of all their images; for `blank`, of blank images too.
    """

    def __init__(self, dataset: SampleDataset, packs: Sequence[Pack]):
        super().__init__(
            dataset.sources, dataset.places, dataset.lengths, dataset.num_images, has_videos=dataset.has_videos,
            skipped=dataset.skipped, contributions=dataset.contributions,
        )  # fmt: skip
        self.packs = packs

    def __getitem__(self, index: int) -> SampleInputs | Skipped:
        number, record = self.places[index].tolist()
        source = self.sources[number]
        try:
            sample = source.sample(record)
            images = find_cached_images(sample, self.processor, self.packs)
            encoded = source.encoder(sample, cached_image_sizes(sample, images, self.processor))
        except BadSample as error:
            return Skipped.from_error(error, source, record)
        return self.inputs(encoded, images)

    def blank(self) -> "BlankCachedFeatureDataset":
        """Return the same samples with blank images."""
        return BlankCachedFeatureDataset(self)

    def inputs(self, encoded: Encoded, images: Sequence[CachedImage]) -> SampleInputs:
        """Return the model's inputs for a sample."""
        inputs: SampleInputs = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        return inputs | make_feature_inputs(images, tiled=self.processor.needs_image_sizes)


class BlankCachedFeatureDataset(torch.utils.data.Dataset[SampleInputs]):
    """The samples of a `CachedFeatureDataset` with blank images, as `BlankImageDataset` has them."""

    def __init__(self, dataset: CachedFeatureDataset):
        self.dataset = dataset
        self.lengths, self.num_images = dataset.lengths, dataset.num_images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> SampleInputs:
        dataset, processor, packs = self.dataset, self.dataset.processor, self.dataset.packs
        sample = dataset.sample(index)
        images = find_cached_images(sample, processor, packs)
        blanks = [require_image(packs, key) for key, _, _ in make_blank_keys(sample, images, processor)]
        return dataset.inputs(dataset.encoded(index, cached_image_sizes(sample, images, processor)), blanks)


def make_feature_inputs(images: Sequence[CachedImage], *, tiled: bool) -> dict[str, Tensor]:
    """Return the model's inputs for images; none where there are none."""
    if not images:
        return {}
    inputs = {"image_features": torch.cat([image.pack.read(image.item) for image in images])}
    if tiled:
        inputs["image_sizes"] = torch.tensor([image.size for image in images])
        inputs["image_views"] = torch.tensor([image.pack.details[image.item, 0].item() for image in images])
    return inputs


def find_cached_images(sample: Sample, processor: Processor, packs: Sequence[Pack]) -> list[CachedImage]:
    """Return a sample's images in the cache.

    Raises:
        BadSample: an image did not open when its features were computed, or has changed or gone since.
    """
    images = []
    for image_ref, kind in zip(sample.images, view_kinds(sample, processor), strict=True):
        file = None if image_ref.path is None else str(image_ref.path)
        try:
            image = find_image(packs, image_cache_key(image_ref, kind))
        except OSError as error:
            raise BadSample(sample.id, f"image {image_ref} does not open: {error}", file) from error
        if image is None:
            raise BadSample(sample.id, f"image {image_ref} has changed since its features were computed", file)
        if (skipped := image.pack.skipped.get(image.item)) is not None:
            raise BadSample(sample.id, skipped.reason, skipped.file)
        images.append(image)
    return images


def cached_image_sizes(sample: Sample, images: Sequence[CachedImage], processor: Processor) -> list[MediaSize]:
    """Return the sizes of images that the processor counts tokens by; none where it needs none."""
    if not processor.needs_image_sizes:
        return []
    pooled = [processor.pools_video_frames and is_video_frame(medium) for medium in sample.media]
    return [None if is_pooled else image.size for is_pooled, image in zip(pooled, images, strict=True)]


def make_blank_keys(
    sample: Sample, images: Sequence[CachedImage], processor: Processor
) -> list[tuple[bytes, tuple[int, int], str]]:
    """Return key, size and kind of the blank image that stands for each image of a sample."""
    kinds = view_kinds(sample, processor)
    known = cached_image_sizes(sample, images, processor) or [None] * len(kinds)
    sizes = [size if isinstance(size, tuple) else BLANK_SIZE for size in known]
    return [(blank_image_cache_key(size, kind), size, kind) for size, kind in zip(sizes, kinds, strict=True)]
