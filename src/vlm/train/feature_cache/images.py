"""Training on the features that a frozen visual encoder gives for the images of a run, in place of the images.

Features are kept by the content of images, so that runs with the same encoder which share some images share theirs.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, TrainingArguments

from vlm.assembly.checkpoint import is_composed_config
from vlm.config.schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.dataset import SampleDataset, Skipped, dummy_image
from vlm.data.feature_cache.images import (
    BLANK_SIZE,
    FRAME_VIEW,
    SQUARE_VIEW,
    CachedFeatureDataset,
    blank_image_cache_key,
    find_cached_images,
    find_image,
    image_cache_key,
    make_blank_keys,
    make_feature_inputs,
    require_image,
    view_kinds,
)
from vlm.data.feature_cache.store import FeatureStore, Pack, PackPlan
from vlm.data.sample import BadSample
from vlm.data.sources import Source
from vlm.data.vision.images import read_image_size
from vlm.models import VLMForConditionalGeneration, VLMProcessor
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.feature_cache.encoder import (
    BLANK_SOURCE,
    FeatureRequest,
    FrozenVisualEncoder,
    RequestedImages,
    frozen_visual_encoder,
)
from vlm.train.feature_cache.writer import FeatureCacheWriter, ItemFeatures

log = logging.getLogger(__name__)

VIEWS_PER_PACK = 2**16
"""About so many views are in a pack: a run that is stopped while it encodes loses those of the last pack."""

ADVICE = (
    "Raise dataset.cache_limit_gb, set dataset.cache_dir to another disk, take fewer records (dataset.max_samples), or "
    "leave out dataset.cache_features"
)

ImageBatch = list[tuple[int, Tensor | BadSample]]
"""Numbers of requests, with what the encoder reads or why an image does not open."""

Requests = Mapping[bytes, FeatureRequest]
"""Where images are, by their keys."""


def require_composed_model(model_config: PreTrainedConfig) -> None:
    """Raise ValueError where a model's own code reads its images, which it then has to be given."""
    if not is_composed_config(model_config):
        raise ValueError(
            f"dataset.cache_features=true: model_type={model_config.model_type} reads images itself; features are "
            "kept for composed models alone. Leave it out"
        )


def replace_images_with_features(
    model: VLMForConditionalGeneration, processor: VLMProcessor, datasets: Sequence[SampleDataset | None],
    collate: Collator, config: DatasetConfig, args: TrainingArguments,
) -> tuple[CachedFeatureDataset | None, ...]:  # fmt: skip
    """Return the samples of a run with features in place of images; those that are not in the cache are computed.

    Args:
        model: a composed model whose encoder is frozen, before the trainer has it.
        processor: the run's.
        datasets: training data, then evaluation data, which is seen with blank images too; None where there is none.
        collate: the run's; its dummy image becomes one of features.
        config: cache, its limit, and what happens with images that do not open.
        args: batch size, workers, devices, precision.

    Raises:
        ValueError: there is no room for the features, or an image does not open.
    """
    present = [dataset for dataset in datasets if dataset is not None]
    sources = list({id(source): source for dataset in present for source in dataset.sources}.values())
    with frozen_visual_encoder(model, processor, args) as encoder:
        writer = ImageFeatureWriter(encoder, sources, config)
        writer.add(lambda: find_image_requests(present, processor, sources, config))
        for dataset in present[1:]:
            writer.add(partial(find_blank_requests, dataset, processor, writer.packs))
    ids, inputs = dummy_image(processor)
    dummy = require_image(writer.packs, blank_image_cache_key(BLANK_SIZE, dummy_view_kind(processor)))
    collate.dummy = ids, make_feature_inputs([dummy], tiled="image_views" in inputs)
    return tuple(None if dataset is None else CachedFeatureDataset(dataset, writer.packs) for dataset in datasets)


def dummy_view_kind(processor: VLMProcessor) -> str:
    """Return how the dummy image of batches without images is seen."""
    return FRAME_VIEW if processor.pools_video_frames else SQUARE_VIEW


def find_image_requests(
    datasets: Sequence[SampleDataset], processor: VLMProcessor, sources: Sequence[Source], config: DatasetConfig
) -> dict[bytes, FeatureRequest]:
    """Return the distinct images of datasets, and the dummy image."""
    kind = dummy_view_kind(processor)
    requests = {blank_image_cache_key(BLANK_SIZE, kind): FeatureRequest(BLANK_SOURCE, 0, 0, kind)}
    numbers = {id(source): number for number, source in enumerate(sources)}
    for dataset in datasets:
        places = np.unique(dataset.places[dataset.num_images > 0], axis=0).tolist()
        for place, record in tqdm(places, "looking for images", leave=False, disable=None):
            source = dataset.sources[place]
            try:
                sample = source.sample(record)
                kinds = view_kinds(sample, processor)
                keys = [image_cache_key(image, kind) for image, kind in zip(sample.images, kinds, strict=True)]
            except (BadSample, OSError) as error:
                problem = error if isinstance(error, BadSample) else BadSample("?", str(error))
                skip_or_raise(problem, source, record, config)
                continue  # the record is left out when its turn comes
            for image, (key, kind) in enumerate(zip(keys, kinds, strict=True)):
                requests.setdefault(key, FeatureRequest(numbers[id(source)], record, image, kind))
    return requests


def find_blank_requests(
    dataset: SampleDataset, processor: VLMProcessor, packs: Sequence[Pack]
) -> dict[bytes, FeatureRequest]:
    """Return the blank images that stand for those of a dataset."""
    requests = {}
    for index in np.flatnonzero(dataset.num_images).tolist():
        try:
            sample = dataset.sample(index)
            images = find_cached_images(sample, processor, packs)
        except BadSample:  # evaluation refuses it before it comes to blank images
            continue
        for key, size, kind in make_blank_keys(sample, images, processor):
            requests.setdefault(key, FeatureRequest(BLANK_SOURCE, 0, 0, kind, size))
    return requests


def skip_or_raise(error: BadSample, source: Source, record: int, config: DatasetConfig) -> Skipped:
    """Return what is noted of a record that cannot be used.

    Raises:
        ValueError: `dataset.on_bad_sample` is `error`.
    """
    skipped = Skipped.from_error(error, source, record)
    if config.on_bad_sample == "error":
        raise skipped.as_error() from error
    return skipped


class ImageFeatureWriter(FeatureCacheWriter[FeatureRequest, ImageBatch]):
    """Finds the features of a run's images in the cache, and has the other images encoded.

    Args:
        encoder: the model's.
        sources: of all records.
        config: cache, its limit, and what happens with images that do not open.

    Attributes:
        packs: those that were opened so far.
    """

    description = "encoding images"
    reason = "it encodes images with the same encoder"

    def __init__(self, encoder: FrozenVisualEncoder, sources: Sequence[Source], config: DatasetConfig):
        self.encoder, self.sources, self.config, self.args = encoder, sources, config, encoder.args
        self.format = broadcast_from_rank0(encoder.format())  # its machine's pages
        digest = broadcast_from_rank0(encoder.digest() if self.args.process_index == 0 else "")
        folder = resolve_cache_folder(config.cache_dir) / "image_features" / digest
        content = "dataset.cache_features=true: features of the images"
        self.store = FeatureStore(folder, config.cache_limit_gb, content, ADVICE)
        self.packs: list[Pack] = []

    def add(self, find_requests: Callable[[], Requests]) -> None:
        """Open the packs of the images that `find_requests()` gives on rank 0, after missing ones were encoded."""
        known = {pack.folder for pack in self.packs}
        for pack in self.open(lambda: self._find_packs(find_requests())):
            if pack.folder in known:
                pack.close()
            else:
                self.packs.append(pack)

    def _find_packs(self, requests: Requests) -> tuple[list[Pack], list[list[PackPlan[FeatureRequest]]]]:
        """Return the packs that hold any of the images, and packs to write, each in a pass of its own."""
        packs = []
        for pack in self.store.open_packs():
            if any(pack.find(key) is not None for key in requests):
                packs.append(pack)
            else:
                pack.close()
        keys = [key for key in requests if find_image(packs, key) is None]
        keys.sort(key=lambda key: (requests[key].source, requests[key].record))
        return packs, [[plan] for plan in self._plan_packs(keys, [requests[key] for key in keys])] if keys else []

    def _plan_packs(self, keys: list[bytes], requests: list[FeatureRequest]) -> list[PackPlan[FeatureRequest]]:
        """Distribute images over packs."""
        details, skipped = self._read_details(requests)
        rows = np.maximum(details[:, 0], 1)
        ends = rows.cumsum()
        gigabytes = int(ends[-1]) * self.format.stride / 1e9
        log.info("The visual encoder sees %s images, %.3g GB", f"{len(keys):,}", gigabytes)
        borders = np.flatnonzero(np.diff((ends - 1) // VIEWS_PER_PACK)) + 1
        return [
            PackPlan(
                json_digest([key.hex() for key in keys[first:end]]), self.format, requests[first:end],
                np.frombuffer(b"".join(keys[first:end]), np.uint64).reshape(-1, 2), rows[first:end],
                details[first:end],
                {number - first: record for number, record in skipped.items() if first <= number < end},
            )
            for first, end in pairwise([0, *borders.tolist(), len(keys)])
        ]  # fmt: skip

    def _read_details(self, requests: Sequence[FeatureRequest]) -> tuple[np.ndarray, dict[int, Skipped]]:
        """Return views, height and width of each image, and which do not open.

        Sizes are read where tokens depend on them; else they are 0.
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
                size = request.size
                if request.source != BLANK_SOURCE:
                    sample = self.sources[request.source].sample(request.record)
                    width, height = read_image_size(sample.images[request.place], sample.id)
                    size = height, width
            except BadSample as error:
                skipped[number] = skip_or_raise(error, self.sources[request.source], request.record, self.config)
                continue
            views = 1 if request.kind == SQUARE_VIEW else tiling.num_views([size])[0]
            details[number] = views, *size
        return details, skipped

    def load(self, plan: PackPlan[FeatureRequest]) -> tuple[RequestedImages, list[list[int]]]:
        """Return images with those of their record, in batches of records."""
        numbers_by_record: dict[tuple[int, int], list[int]] = {}
        for number, request in enumerate(plan.items):
            if number not in plan.skipped:
                is_blank = request.source == BLANK_SOURCE
                record = (BLANK_SOURCE, number) if is_blank else (request.source, request.record)
                numbers_by_record.setdefault(record, []).append(number)
        groups = list(numbers_by_record.values())
        size = self.args.per_device_train_batch_size
        batches = [list(range(start, min(start + size, len(groups)))) for start in range(0, len(groups), size)]
        return RequestedImages(self.encoder.processor, self.sources, plan.items, groups), batches

    def collate(self, samples: list[ImageBatch]) -> ImageBatch:
        """Put the images of several records into one list."""
        return [image for record in samples for image in record]

    def compute(
        self, plans: list[PackPlan[FeatureRequest]], batch: ImageBatch
    ) -> Iterator[tuple[int, ItemFeatures | Skipped]]:
        """Encode the images of a batch."""
        opened: dict[int, Tensor] = {}
        for number, views in batch:
            if isinstance(views, BadSample):
                request = plans[0].items[number]
                yield number, skip_or_raise(views, self.sources[request.source], request.record, self.config)
            else:
                opened[number] = views
        if opened:
            features = self.encoder(torch.cat(list(opened.values()))).split(list(map(len, opened.values())))
            yield from zip(opened, ([views] for views in features), strict=True)
