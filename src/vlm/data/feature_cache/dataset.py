"""Samples of which no picture is opened: what a frozen visual encoder gives for each is read from files."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch

from vlm.data.dataset import SampleDataset, Skipped
from vlm.data.feature_cache.reader import ImageFeatures, Seen
from vlm.data.sample import BadSample, Picture, Sample, Size, Video

BLANK_SIZE = (64, 64)
"""Height and width of a blank picture where no picture's own are needed, as `dataset.blank_picture` has it."""

FRAME, WHOLE, TILES = "frame", "whole", "tiles"
"""How a picture is seen: as a frame of a video, as one square, or as one and its tiles."""


def kinds_of(sample: Sample, processor: Any) -> list[str]:
    """How each picture of a sample is seen."""
    tiling = processor.tiling
    if tiling is None:
        return [WHOLE] * len(sample.media)
    side = (tiling.tile_size, tiling.tile_size)
    views = tiling.num_views([None if is_frame(one) else side for one in sample.media])
    return [{0: FRAME, 1: WHOLE}.get(number, TILES) for number in views]


def is_frame(one: Picture | Video) -> bool:
    """Whether a picture stands for a part of a video."""
    return isinstance(one, Picture) and one.frame is not None


def picture_key(picture: Picture, kind: str) -> bytes:
    """A name for a picture's content, and how it is seen: 16 bytes. Of a file, path, size and time stand for it.

    Raises:
        OSError: there is no such file.
    """
    digest = blake2b(kind.encode(), digest_size=16)
    if picture.content is not None:
        digest.update(b"\0" + picture.content)
    else:
        assert picture.path is not None
        facts = picture.path.stat()
        name = f"\1{os.path.abspath(picture.path)}\n{facts.st_size}\n{facts.st_mtime_ns}\n{picture.frame}"
        digest.update(name.encode(errors="surrogateescape"))
    return digest.digest()


def blank_key(size: tuple[int, int], kind: str) -> bytes:
    """A name for a blank picture of this size."""
    return blake2b(f"{kind}\2{size[0]} x {size[1]}".encode(), digest_size=16).digest()


class SeenDataset(SampleDataset):
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
            seen = seen_of(sample, self.processor, self.features)
            encoded = source.encoder(sample, sizes_of(sample, seen, self.processor))
        except BadSample as error:
            return Skipped.by(error, source, record)
        return self.inputs(encoded, seen)

    def blank(self) -> "BlankSeen":
        """The same samples with blank pictures."""
        return BlankSeen(self)

    def inputs(self, encoded: Any, seen: Sequence[Seen]) -> dict[str, Any]:
        """What the model reads of a sample."""
        found: dict[str, Any] = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        return found | feature_inputs(self.features, seen, tiled=self.processor.needs_sizes)


class BlankSeen(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples of a `SeenDataset` with blank pictures, as `BlankPictures` has them."""

    def __init__(self, dataset: SeenDataset):
        self.dataset = dataset
        self.lengths, self.num_images = dataset.lengths, dataset.num_images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole, processor = self.dataset, self.dataset.processor
        sample = whole.sample(index)
        seen = seen_of(sample, processor, whole.features)
        blanks = [found_in(whole.features, key) for key, _, _ in blanks_of(sample, seen, processor)]
        return whole.inputs(whole.encoded(index, sizes_of(sample, seen, processor)), blanks)


def feature_inputs(features: ImageFeatures, seen: Sequence[Seen], *, tiled: bool) -> dict[str, torch.Tensor]:
    """What the model reads of pictures; nothing where there are none."""
    if not seen:
        return {}
    inputs = {"image_features": torch.cat([features.read(one) for one in seen])}
    if tiled:
        inputs["image_sizes"] = torch.tensor([one.size for one in seen])
        inputs["image_views"] = torch.tensor([one.views for one in seen])
    return inputs


def file_name(picture: Picture) -> str | None:
    """What an error calls a picture's file."""
    return None if picture.path is None else str(picture.path)


def seen_of(sample: Sample, processor: Any, features: ImageFeatures) -> list[Seen]:
    """A sample's pictures in the files.

    Raises:
        BadSample: one did not open when its features were computed, or is not there any more as it was then.
    """
    found = []
    for one, kind in zip(sample.pictures, kinds_of(sample, processor), strict=True):
        file = file_name(one)
        try:
            seen = features.find(picture_key(one, kind))
        except OSError as error:
            raise BadSample(sample.id, f"image {one} does not open: {error}", file) from error
        if seen is None:
            raise BadSample(sample.id, f"image {one} has changed since its features were computed", file)
        if seen.problem is not None:
            raise BadSample(sample.id, *seen.problem)
        found.append(seen)
    return found


def sizes_of(sample: Sample, seen: Sequence[Seen], processor: Any) -> list[Size]:
    """What the processor needs to know of the pictures to count tokens."""
    if not processor.needs_sizes:
        return []
    pooled = [processor.pools_frames and is_frame(one) for one in sample.media]
    return [None if hidden else one.size for hidden, one in zip(pooled, seen, strict=True)]


def blanks_of(sample: Sample, seen: Sequence[Seen], processor: Any) -> list[tuple[bytes, tuple[int, int], str]]:
    """Key, size and kind of the blank picture that stands for each picture of a sample."""
    kinds = kinds_of(sample, processor)
    known: list[Any] = sizes_of(sample, seen, processor)  # no clips, where pictures are all there is
    sizes = [one or BLANK_SIZE for one in known] or [BLANK_SIZE] * len(kinds)
    return [(blank_key(size, kind), size, kind) for size, kind in zip(sizes, kinds, strict=True)]


def found_in(features: ImageFeatures, key: bytes) -> Seen:
    """A picture that must be there."""
    seen = features.find(key)
    assert seen is not None
    return seen
