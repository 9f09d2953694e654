"""Training on the features that a frozen visual encoder gives for the images of a run, in place of the images.

Which images those are is found out here; `images.py` has them encoded.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, TrainingArguments

from vlm.assembly.checkpoint import is_composed_config
from vlm.config.schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import SampleDataset, dummy_image
from vlm.data.feature_cache.dataset import (
    BLANK_SIZE,
    FRAME_VIEW,
    SQUARE_VIEW,
    CachedFeatureDataset,
    ImageFeatures,
    blank_image_cache_key,
    find_cached_images,
    image_cache_key,
    make_blank_keys,
    make_feature_inputs,
    view_kinds,
)
from vlm.data.sample import BadSample
from vlm.data.sources import Source
from vlm.models import VLMForConditionalGeneration, VLMProcessor
from vlm.train.feature_cache.encoder import BLANK_SOURCE, FeatureRequest, FrozenVisualEncoder
from vlm.train.feature_cache.images import ImageFeatureComputation, skip_or_raise


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
    with FrozenVisualEncoder(model, processor, args) as encoder:
        computation = ImageFeatureComputation(encoder, sources, config)
        computation.add(lambda: find_image_requests(present, processor, sources, config))
        for dataset in present[1:]:
            computation.add(partial(find_blank_requests, dataset, processor, computation.features))
    features = computation.features
    collate.dummy = make_dummy_features(processor, features)
    return tuple(None if dataset is None else CachedFeatureDataset(dataset, features) for dataset in datasets)


def make_dummy_features(processor: VLMProcessor, features: ImageFeatures) -> tuple[list[int], dict[str, Tensor]]:
    """Return the dummy image of batches without images, its features in place of its pixels."""
    ids, inputs = dummy_image(processor)
    return ids, make_feature_inputs([features.require(dummy_key(processor))], tiled="image_views" in inputs)


def dummy_key(processor: VLMProcessor) -> bytes:
    """Return the key of the dummy image."""
    return blank_image_cache_key(BLANK_SIZE, dummy_view_kind(processor))


def dummy_view_kind(processor: VLMProcessor) -> str:
    """Return how the dummy image is seen."""
    return FRAME_VIEW if processor.pools_video_frames else SQUARE_VIEW


def find_image_requests(
    datasets: Sequence[SampleDataset], processor: VLMProcessor, sources: Sequence[Source], config: DatasetConfig
) -> dict[bytes, FeatureRequest]:
    """Return the distinct images of datasets, and the dummy image."""
    requests = {dummy_key(processor): FeatureRequest(BLANK_SOURCE, 0, 0, dummy_view_kind(processor))}
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
    dataset: SampleDataset, processor: VLMProcessor, features: ImageFeatures
) -> dict[bytes, FeatureRequest]:
    """Return the blank images that stand for those of a dataset."""
    requests = {}
    for index in np.flatnonzero(dataset.num_images).tolist():
        try:
            sample = dataset.sample(index)
            images = find_cached_images(sample, processor, features)
        except BadSample:  # evaluation refuses it before it comes to blank images
            continue
        for key, size, kind in make_blank_keys(sample, images, processor):
            requests.setdefault(key, FeatureRequest(BLANK_SOURCE, 0, 0, kind, size))
    return requests
