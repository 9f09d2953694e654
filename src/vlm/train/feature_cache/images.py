"""Training on the features that a frozen visual encoder gives for the images of a run, in place of the images.

Features are kept by the content of images, so that runs with the same encoder which share some images share theirs.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, groupby, pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, TrainingArguments

from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image, make_blank_image
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.dataset import SampleDataset
from vlm.data.feature_cache.images import (
    BLANK_SIZE,
    FRAME_VIEW,
    SQUARE_VIEW,
    CachedFeatureDataset,
    blank_image_cache_key,
    find_cached_images,
    find_image,
    image_cache_keys,
    make_feature_inputs,
    require_image,
)
from vlm.data.feature_cache.store import FeatureStore, Pack, PackPlan
from vlm.data.progress import show_progress
from vlm.data.sample import BadSample, ImageRef
from vlm.data.skipped import Skipped
from vlm.data.sources import Source
from vlm.data.vision.images import read_image_size
from vlm.models import VLMForConditionalGeneration, VLMProcessor
from vlm.models.configuration_prediction import is_composed
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.feature_cache.encoder import (
    BLANK_SOURCE,
    FeatureRequest,
    FrozenVisualEncoder,
    frozen_visual_encoder,
    make_record_views,
    open_images,
)
from vlm.train.feature_cache.writer import FeatureCacheWriter, ItemFeatures, PacksAndPlans

log = logging.getLogger(__name__)

VIEWS_PER_PACK = 2**16
"""About so many views are in a pack: a run that is stopped while it encodes loses those of the last pack."""

ADVICE = (
    "Raise dataset.cache_limit_gb, set dataset.cache_dir to another disk, use fewer records (dataset.max_samples), or "
    "leave out dataset.cache_features"
)

Requests = dict[bytes, FeatureRequest]
"""Where images are, by their keys."""

Views = dict[int, Tensor]
"""Index of a request -> what the encoder reads."""


def refuse_native_resolution(model_config: PreTrainedConfig) -> None:
    """Raise ValueError for a composed model that reads images at native resolution: their features differ in number."""
    if is_composed(model_config) and model_config.native is not None:
        raise ValueError(
            "dataset.cache_features=true: images at native resolution have different numbers of features, and the "
            "cache needs the same number for each. Leave it out, or choose dataset.image_mode=square"
        )


def replace_images_with_features(
    model: VLMForConditionalGeneration,
    processor: VLMProcessor,
    datasets: Sequence[SampleDataset | None],
    collate: Collator,
    config: DatasetConfig,
    args: TrainingArguments,
) -> tuple[CachedFeatureDataset | None, ...]:
    """Return the samples of a run with features in place of images; those that are not in the cache are computed.

    The datasets are training data, then evaluation data, which is seen with blank images too; None if there is none.
    The collator's dummy image becomes one of features.

    Raises:
        ValueError: there is no room for the features, or an image does not open.
    """
    present = [dataset for dataset in datasets if dataset is not None]
    sources = list({id(source): source for dataset in present for source in dataset.sources}.values())
    with frozen_visual_encoder(model, processor, args) as encoder:
        writer = ImageFeatureWriter(encoder, sources, config)
        writer.add(lambda: writer.find_image_requests(present))
        for dataset in present[1:]:
            writer.add(partial(writer.find_blank_requests, dataset))
    dummy = require_image(writer.packs, blank_image_cache_key(*writer.dummy))
    collate.dummy = dummy_image(processor)[0], make_feature_inputs([dummy], processor)
    return tuple(None if dataset is None else CachedFeatureDataset(dataset, writer.packs) for dataset in datasets)


def refuse_unless_skipped(config: DatasetConfig, skipped: list[Skipped], num_samples: int) -> None:
    """Raise ValueError at a record that cannot be used where `dataset.on_bad_sample` is `error`."""
    if skipped and config.on_bad_sample == "error":
        raise skipped[0].as_error()


class ImageFeatureWriter(FeatureCacheWriter[FeatureRequest, Views]):
    """Finds the features of a run's images in the cache, and has the other images encoded.

    Attributes:
        dummy: size and kind of the dummy image of batches without images.
        packs: those that were opened so far.
    """

    description = "encoding images"
    reason = "it encodes images with the same encoder"

    def __init__(self, encoder: FrozenVisualEncoder, sources: Sequence[Source], config: DatasetConfig):
        self.encoder, self.processor, self.args = encoder, encoder.processor, encoder.args
        self.sources, self.on_skipped = sources, partial(refuse_unless_skipped, config)
        self.format = broadcast_from_rank0(encoder.format())  # its machine's pages
        digest = broadcast_from_rank0(encoder.digest() if self.args.process_index == 0 else "")
        folder = resolve_cache_folder(config.cache_dir) / "image_features" / digest
        content = "dataset.cache_features=true: features of the images"
        self.store = FeatureStore(folder, config.cache_limit_gb, content, ADVICE)
        dummy_kind = FRAME_VIEW if self.processor.pools_video_frames else SQUARE_VIEW
        self.dummy = BLANK_SIZE, dummy_kind
        self.packs: list[Pack] = []

    def find_image_requests(self, datasets: Sequence[SampleDataset]) -> Requests:
        """Return the distinct images of datasets, and the dummy image; records that cannot be used are left out."""
        requests = {blank_image_cache_key(*self.dummy): FeatureRequest((BLANK_SOURCE, 0), 0, *self.dummy)}
        numbers = {id(source): number for number, source in enumerate(self.sources)}
        for dataset in datasets:
            places = np.unique(dataset.places[dataset.num_images > 0], axis=0).tolist()
            for number, record in show_progress(places, "looking for images", silent=self.args.process_index > 0):
                source = dataset.sources[number]
                try:
                    keys = image_cache_keys(source.sample(record), self.processor)
                except BadSample as error:
                    self.on_skipped([Skipped.from_error(error, source, record)], 0)
                    continue
                for place, (key, kind) in enumerate(keys):
                    requests.setdefault(key, FeatureRequest((numbers[id(source)], record), place, None, kind))
        return requests

    def find_blank_requests(self, dataset: SampleDataset) -> Requests:
        """Return the blank images that stand for those of a dataset."""
        requests: Requests = {}
        for index in np.flatnonzero(dataset.num_images).tolist():
            try:
                images = find_cached_images(dataset.sample(index), self.processor, self.packs)
            except BadSample:  # evaluation refuses it before it comes to blank images
                continue
            for blank in (image.blank for image in images):
                request = FeatureRequest((BLANK_SOURCE, len(requests)), 0, *blank)
                requests.setdefault(blank_image_cache_key(*blank), request)
        return requests

    def add(self, find_requests: Callable[[], Requests]) -> None:
        """Open the packs of the images that `find_requests()` gives on rank 0, after missing ones were encoded."""
        self.packs += self.open(lambda: self._find_packs(find_requests()))

    def _find_packs(self, requests: Requests) -> PacksAndPlans[FeatureRequest]:
        """Return further packs that hold any of the images, and packs to write, each in a pass of its own."""
        keys = [key for key in requests if find_image(self.packs, key) is None]
        packs = [pack for pack in self.store.open_packs() if any(pack.find(key) is not None for key in keys)]
        keys = [key for key in keys if find_image(packs, key) is None]
        keys.sort(key=lambda key: requests[key].record)
        return packs, [[plan] for plan in self._plan_packs(keys, [requests[key] for key in keys])] if keys else []

    def _plan_packs(self, keys: list[bytes], requests: list[FeatureRequest]) -> list[PackPlan[FeatureRequest]]:
        """Distribute images over packs."""
        details, skipped = self._read_details(requests)
        rows = np.maximum(details[:, 0], 1)
        ends = rows.cumsum()
        gigabytes = int(ends[-1]) * self.format.stride / 1e9
        log.info("Caching the visual features of %s images (%.3g GB)", f"{len(keys):,}", gigabytes)
        borders = np.flatnonzero(np.diff((ends - 1) // VIEWS_PER_PACK)) + 1
        return [
            PackPlan(
                json_digest([key.hex() for key in keys[first:end]]),
                self.format,
                requests[first:end],
                np.frombuffer(b"".join(keys[first:end]), np.uint64).reshape(-1, 2),
                rows[first:end],
                details[first:end],
                {number - first: record for number, record in skipped.items() if first <= number < end},
            )
            for first, end in pairwise([0, *borders.tolist(), len(keys)])
        ]

    def _read_details(self, requests: Sequence[FeatureRequest]) -> tuple[np.ndarray, dict[int, Skipped]]:
        """Return views, height and width of each image, and which do not open.

        Sizes are read where tokens depend on them; else they are 0.
        """
        details = np.zeros((len(requests), 3), dtype=np.int64)
        details[:, 0] = [0 if request.kind == FRAME_VIEW else 1 for request in requests]
        skipped: dict[int, Skipped] = {}
        if (tiling := self.processor.tiling) is None:
            return details, skipped
        for index in np.flatnonzero(details[:, 0]).tolist():
            request = requests[index]
            if (size := request.size) is None:
                source, record = self.sources[request.record[0]], request.record[1]
                try:
                    sample = source.sample(record)
                    width, height = read_image_size(sample.images[request.place], sample.id)
                    size = height, width
                except BadSample as error:
                    skipped[index] = Skipped.from_error(error, source, record)
                    self.on_skipped([skipped[index]], 0)
                    continue
            views = 1 if request.kind == SQUARE_VIEW else tiling.num_views([size])[0]
            details[index] = views, *size
        return details, skipped

    def batches(self, plan: PackPlan[FeatureRequest]) -> list[list[int]]:
        """Return batches of records, the images of a record together."""
        indices = [index for index in range(len(plan.items)) if index not in plan.skipped]
        records = [list(group) for _, group in groupby(indices, lambda index: plan.items[index].record)]
        size = self.args.per_device_train_batch_size
        return [list(chain(*records[start : start + size])) for start in range(0, len(records), size)]

    def load(self, plan: PackPlan[FeatureRequest], indices: list[int]) -> tuple[dict[int, Skipped], Views]:
        """Decode images and cut them into views; those of a record are opened together."""
        skipped: dict[int, Skipped] = {}
        views: Views = {}
        for (number, record), group in groupby(indices, lambda index: plan.items[index].record):
            numbered = [(index, plan.items[index]) for index in group]
            name, image_refs = "?", [ImageRef()]
            if (size := numbered[0][1].size) is not None:
                images = [make_blank_image(self.processor, size)]
            else:
                sample = self.sources[number].sample(record)
                name, image_refs = sample.id, [sample.images[request.place] for _, request in numbered]
                images = open_images(image_refs, name, self.processor)
            for (index, request), image_ref, image in zip(numbered, image_refs, images, strict=True):
                try:
                    views[index] = make_record_views(self.processor, image, request.kind, image_ref, name)
                except BadSample as error:
                    skipped[index] = Skipped.from_error(error, self.sources[number], record)
        return skipped, views

    def compute(self, plans: list[PackPlan[FeatureRequest]], batch: Views) -> Iterable[tuple[int, ItemFeatures]]:
        """Encode the views of a batch's images."""
        if not batch:
            return ()
        features = self.encoder(torch.cat(list(batch.values()))).split(list(map(len, batch.values())))
        return zip(batch, ([views] for views in features), strict=True)
