"""Image features as packs: which packs hold a run's images, which are to be written, and the batches of the encoder.

They are kept by the content of images, so that runs with the same encoder which share some images share their features.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from vlm.config.schema import DatasetConfig
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.dataset import Skipped
from vlm.data.feature_cache.dataset import FRAME_VIEW, SQUARE_VIEW, ImageFeatures
from vlm.data.feature_cache.reader import Pack, open_all_packs
from vlm.data.feature_cache.store import FeatureStore, PackPlan
from vlm.data.sample import BadSample
from vlm.data.sources import Source
from vlm.data.vision.images import read_image_size
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.feature_cache.encoder import (
    BLANK_SOURCE,
    FeatureRequest,
    FrozenVisualEncoder,
    ImageViews,
    RequestedImages,
)
from vlm.train.feature_cache.writer import FeatureCacheWriter, FeatureComputation, ItemFeatures

log = logging.getLogger(__name__)

VIEWS_PER_PACK = 2**16
"""About so many views are in a pack: a run that is stopped while it encodes loses those of the last pack."""

ADVICE = (
    "Raise dataset.cache_limit_gb, set dataset.cache_dir to another disk, take fewer records (dataset.max_samples), or "
    "leave out dataset.cache_features"
)

ImageBatch = list[tuple[int, ImageViews | BadSample]]
"""Numbers of requests, with what the encoder reads or why an image does not open."""

Requests = Mapping[bytes, FeatureRequest]
"""Key of an image -> where it is."""


def skip_or_raise(error: BadSample, source: Source, record: int, config: DatasetConfig) -> Skipped:
    """Return what is noted of a record that cannot be used.

    Raises:
        ValueError: `dataset.on_bad_sample` is `error`.
    """
    skipped = Skipped.from_error(error, source, record)
    if config.on_bad_sample == "error":
        raise skipped.as_error() from error
    return skipped


class ImageFeatureComputation(FeatureComputation[FeatureRequest, ImageBatch]):
    """Finds the features of a run's images in the cache, and encodes the other images.

    Args:
        encoder: the model's.
        sources: of all records.
        config: cache, its limit, and what happens with images that do not open.

    Attributes:
        features: what was found or computed so far.
    """

    description = "encoding images"
    reason = "it encodes images with the same encoder"

    def __init__(self, encoder: FrozenVisualEncoder, sources: Sequence[Source], config: DatasetConfig):
        self.encoder, self.sources, self.config, self.args = encoder, sources, config, encoder.args
        self.format = broadcast_from_rank0(encoder.format())  # its machine's pages
        digest = broadcast_from_rank0(encoder.digest() if self.args.process_index == 0 else "")
        root = resolve_cache_folder(config.cache_dir) / "image_features"
        content = "dataset.cache_features=true: features of the images"
        self.store = FeatureStore(root / digest, config.cache_limit_gb, content, ADVICE)
        self.features = ImageFeatures([])

    def add(self, find_requests: Callable[[], Requests]) -> None:
        """Add the images that `find_requests()` gives on rank 0 to `features`, encoding those that are in no pack."""
        known = {pack.folder for pack in self.features.packs}
        for pack in FeatureCacheWriter(self.store, self).open(lambda: self._find_packs(find_requests())):
            if pack.folder in known:
                pack.close()
            else:
                self.features.packs.append(pack)

    def _find_packs(self, requests: Requests) -> tuple[list[Pack], list[list[PackPlan[FeatureRequest]]]]:
        """Return the packs that hold any of the images, and those that are to be written, each in a pass of its own."""
        packs = []
        for pack in open_all_packs(self.store.folder):
            if any(pack.find(key) is not None for key in requests):
                packs.append(pack)
            else:
                pack.close()
        known = ImageFeatures(packs)
        missing = {key: request for key, request in requests.items() if known.find(key) is None}
        return packs, [[plan] for plan in self._plan_packs(missing)] if missing else []

    def _plan_packs(self, missing: Requests) -> list[PackPlan[FeatureRequest]]:
        """Distribute images over packs, in the order of their records."""
        keys = sorted(missing, key=lambda key: (missing[key].source, missing[key].record))
        requests = [missing[key] for key in keys]
        details, skipped = self._read_details(requests)
        rows = np.maximum(details[:, 0], 1)
        ends = rows.cumsum()
        log.info(
            "The visual encoder sees %s images, %.3g GB", f"{len(keys):,}", int(ends[-1]) * self.format.stride / 1e9
        )
        borders = [0, *(np.flatnonzero(np.diff((ends - 1) // VIEWS_PER_PACK)) + 1).tolist(), len(keys)]
        return [
            PackPlan(
                name=json_digest([key.hex() for key in keys[first:end]]),
                format=self.format,
                items=requests[first:end],
                keys=np.frombuffer(b"".join(keys[first:end]), np.uint64).reshape(-1, 2),
                counts=rows[first:end],
                details=details[first:end],
                skipped={number - first: record for number, record in skipped.items() if first <= number < end},
            )
            for first, end in pairwise(borders)
        ]

    def _read_details(self, requests: Sequence[FeatureRequest]) -> tuple[np.ndarray, dict[int, Skipped]]:
        """Return views, height and width of each image, and which do not open, as far as planning needs to know.

        Sizes are read where the number of views depends on them; else they are 0.
        """
        details = np.zeros((len(requests), 3), dtype=np.int64)
        details[:, 0] = [0 if request.kind == FRAME_VIEW else 1 for request in requests]
        skipped: dict[int, Skipped] = {}
        if (tiling := self.encoder.processor.tiling) is None:
            return details, skipped
        for number, request in enumerate(requests):
            if request.kind == FRAME_VIEW:
                continue
            try:
                size = request.size if request.source == BLANK_SOURCE else self._read_image_size(request)
            except BadSample as error:
                skipped[number] = skip_or_raise(error, self.sources[request.source], request.record, self.config)
                continue
            views = 1 if request.kind == SQUARE_VIEW else tiling.num_views([size])[0]
            details[number] = views, *size
        return details, skipped

    def _read_image_size(self, request: FeatureRequest) -> tuple[int, int]:
        sample = self.sources[request.source].sample(request.record)
        width, height = read_image_size(sample.images[request.place], sample.id)
        return height, width

    def load(self, items: list[FeatureRequest], skipped: dict[int, Skipped]) -> Iterable[ImageBatch]:
        """Return batches of records, each with all its images."""
        numbers_by_record: dict[tuple[int, int], list[int]] = {}
        for number, request in enumerate(items):
            if number not in skipped:
                is_blank = request.source == BLANK_SOURCE
                record = (BLANK_SOURCE, number) if is_blank else (request.source, request.record)
                numbers_by_record.setdefault(record, []).append(number)
        groups = list(numbers_by_record.values())
        size = self.args.per_device_train_batch_size
        batches = [list(range(start, min(start + size, len(groups)))) for start in range(0, len(groups), size)]
        images = RequestedImages(self.encoder.processor, self.sources, items, groups)
        return self.make_loader(images, batches, _flatten)

    def compute(
        self, plans: Sequence[PackPlan[FeatureRequest]], batch: ImageBatch
    ) -> Iterator[tuple[int, ItemFeatures | Skipped]]:
        """Encode the images of a batch."""
        opened: list[tuple[int, ImageViews]] = []
        for number, views in batch:
            if isinstance(views, BadSample):
                request = plans[0].items[number]
                yield number, skip_or_raise(views, self.sources[request.source], request.record, self.config)
            else:
                opened.append((number, views))
        if opened:
            pixels = [views for _, (views, _) in opened]
            features = self.encoder(torch.cat(pixels)).split([len(views) for views in pixels])
            planned = plans[0].details
            for (number, (_, size)), views in zip(opened, features, strict=True):
                yield number, ItemFeatures([views], (int(planned[number, 0]), *size))


def _flatten(items: Sequence[ImageBatch]) -> ImageBatch:
    return [image for item in items for image in item]
