"""Samples of which no picture is opened: what a frozen visual encoder gives for each is read from files."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch

from vlm.data.dataset import SampleDataset, Skipped
from vlm.data.feature_cache.reader import CachedImage, ImageFeatures
from vlm.data.sample import BadSample, ImageRef, MediaSize, Sample, VideoRef

BLANK_SIZE = (64, 64)
"""Height and width of a blank picture where no picture's own are needed, as `dataset.make_blank_image` has it."""

FRAME_VIEW, SQUARE_VIEW, TILED_VIEW = "frame", "whole", "tiles"
"""How a picture is seen: as a frame of a video, as one square, or as one and its tiles."""


def view_kinds(sample: Sample, processor: Any) -> list[str]:
    """How each picture of a sample is seen."""
    tiling = processor.tiling
    if tiling is None:
        return [SQUARE_VIEW] * len(sample.media)
    side = (tiling.tile_size, tiling.tile_size)
    views = tiling.num_views([None if is_video_frame(one) else side for one in sample.media])
    return [{0: FRAME_VIEW, 1: SQUARE_VIEW}.get(number, TILED_VIEW) for number in views]


def is_video_frame(one: ImageRef | VideoRef) -> bool:
    """Whether a picture stands for a part of a video."""
    return isinstance(one, ImageRef) and one.frame is not None


def image_cache_key(image_ref: ImageRef, kind: str) -> bytes:
    """A name for a picture's content, and how it is seen: 16 bytes. Of a file, path, size and time stand for it.

    Raises:
        OSError: there is no such file.
    """
    digest = blake2b(kind.encode(), digest_size=16)
    if image_ref.content is not None:
        digest.update(b"\0" + image_ref.content)
    else:
        assert image_ref.path is not None
        facts = image_ref.path.stat()
        name = f"\1{os.path.abspath(image_ref.path)}\n{facts.st_size}\n{facts.st_mtime_ns}\n{image_ref.frame}"
        digest.update(name.encode(errors="surrogateescape"))
    return digest.digest()


def blank_image_cache_key(size: tuple[int, int], kind: str) -> bytes:
    """A name for a blank picture of this size."""
    return blake2b(f"{kind}\2{size[0]} x {size[1]}".encode(), digest_size=16).digest()


class CachedFeatureDataset(SampleDataset):
    """A `SampleDataset` with `image_features` in place of `pixel_values`.

    Args:
        dataset: the samples.
        features: of all their pictures; for `blank`, of blank ones too.
    """

    def __init__(self, dataset: SampleDataset, features: ImageFeatures):
        super().__init__(
            dataset.sources, dataset.places, dataset.lengths, dataset.num_images, has_videos=dataset.has_videos,
            skipped=dataset.skipped, contributions=dataset.contributions,
        )  # fmt: skip
        self.features = features

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        number, record = self.places[index].tolist()
        source = self.sources[number]
        try:
            sample = source.sample(record)
            seen = find_cached_images(sample, self.processor, self.features)
            encoded = source.encoder(sample, cached_image_sizes(sample, seen, self.processor))
        except BadSample as error:
            return Skipped.from_error(error, source, record)
        return self.inputs(encoded, seen)

    def blank(self) -> "BlankCachedFeatureDataset":
        """The same samples with blank pictures."""
        return BlankCachedFeatureDataset(self)

    def inputs(self, encoded: Any, seen: Sequence[CachedImage]) -> dict[str, Any]:
        """What the model reads of a sample."""
        found: dict[str, Any] = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        return found | make_feature_inputs(self.features, seen, tiled=self.processor.needs_image_sizes)


class BlankCachedFeatureDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples of a `CachedFeatureDataset` with blank pictures, as `BlankImageDataset` has them."""

    def __init__(self, dataset: CachedFeatureDataset):
        self.dataset = dataset
        self.lengths, self.num_images = dataset.lengths, dataset.num_images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole, processor = self.dataset, self.dataset.processor
        sample = whole.sample(index)
        seen = find_cached_images(sample, processor, whole.features)
        blanks = [require_cached_image(whole.features, key) for key, _, _ in make_blank_keys(sample, seen, processor)]
        return whole.inputs(whole.encoded(index, cached_image_sizes(sample, seen, processor)), blanks)


def make_feature_inputs(
    features: ImageFeatures, seen: Sequence[CachedImage], *, tiled: bool
) -> dict[str, torch.Tensor]:
    """What the model reads of pictures; nothing where there are none."""
    if not seen:
        return {}
    inputs = {"image_features": torch.cat([features.read(one) for one in seen])}
    if tiled:
        inputs["image_sizes"] = torch.tensor([one.size for one in seen])
        inputs["image_views"] = torch.tensor([one.views for one in seen])
    return inputs


def image_file_name(image_ref: ImageRef) -> str | None:
    """What an error calls a picture's file."""
    return None if image_ref.path is None else str(image_ref.path)


def find_cached_images(sample: Sample, processor: Any, features: ImageFeatures) -> list[CachedImage]:
    """A sample's pictures in the files.

    Raises:
        BadSample: one did not open when its features were computed, or is not there any more as it was then.
    """
    found = []
    for one, kind in zip(sample.images, view_kinds(sample, processor), strict=True):
        file = image_file_name(one)
        try:
            seen = features.find(image_cache_key(one, kind))
        except OSError as error:
            raise BadSample(sample.id, f"image {one} does not open: {error}", file) from error
        if seen is None:
            raise BadSample(sample.id, f"image {one} has changed since its features were computed", file)
        if seen.problem is not None:
            raise BadSample(sample.id, *seen.problem)
        found.append(seen)
    return found


def cached_image_sizes(sample: Sample, seen: Sequence[CachedImage], processor: Any) -> list[MediaSize]:
    """What the processor needs to know of the pictures to count tokens."""
    if not processor.needs_image_sizes:
        return []
    pooled = [processor.pools_video_frames and is_video_frame(one) for one in sample.media]
    return [None if hidden else one.size for hidden, one in zip(pooled, seen, strict=True)]


def make_blank_keys(
    sample: Sample, seen: Sequence[CachedImage], processor: Any
) -> list[tuple[bytes, tuple[int, int], str]]:
    """Key, size and kind of the blank picture that stands for each picture of a sample."""
    kinds = view_kinds(sample, processor)
    known: list[Any] = cached_image_sizes(sample, seen, processor)  # no clips, where pictures are all there is
    sizes = [one or BLANK_SIZE for one in known] or [BLANK_SIZE] * len(kinds)
    return [(blank_image_cache_key(size, kind), size, kind) for size, kind in zip(sizes, kinds, strict=True)]


def require_cached_image(features: ImageFeatures, key: bytes) -> CachedImage:
    """A picture that must be there."""
    seen = features.find(key)
    assert seen is not None
    return seen
