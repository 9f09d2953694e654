"""Training on what a frozen visual encoder gives for the pictures of a run, in place of the pictures.

Which pictures those are is found out here, and `filling.py` has them computed; see `data/feature_files.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import TrainingArguments

from vlm.config.schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import SampleDataset, dummy_image
from vlm.data.feature_cache.dataset import (
    BLANK_SIZE,
    FRAME_VIEW,
    SQUARE_VIEW,
    CachedFeatureDataset,
    blank_image_cache_key,
    find_cached_images,
    image_cache_key,
    make_blank_keys,
    make_feature_inputs,
    require_cached_image,
    view_kinds,
)
from vlm.data.feature_cache.reader import ImageFeatures
from vlm.data.sample import BadSample
from vlm.data.sources import Source
from vlm.models import VLMConfig
from vlm.train.feature_cache.encoder import BLANK_SOURCE, FeatureRequest, FrozenVisualEncoder
from vlm.train.feature_cache.writer import FeatureCacheWriter, raise_unless_skipped


def require_composed_model(model_config: Any) -> None:
    """Raise ValueError where a model's own code reads its pictures, which then has to have them."""
    if not isinstance(model_config, VLMConfig):
        raise ValueError(
            f"dataset.cache_features=true: model_type={model_config.model_type} reads pictures itself; features are "
            "kept for composed models alone. Leave it out"
        )


def replace_images_with_features(
    model: Any, processor: Any, datasets: Sequence[Any], collate: Collator, config: DatasetConfig,
    args: TrainingArguments,
) -> tuple[Any, ...]:  # fmt: skip
    """The samples of a run with features in place of pictures; what is not kept yet is computed.

    Args:
        model: a composed model whose encoder is frozen, before the trainer has it.
        processor: the run's.
        datasets: what trains, and what is evaluated on, with blank pictures too; None where there is nothing.
        collate: lays them out; its dummy becomes one of features.
        config: cache, its limit, and what happens with pictures that do not open.
        args: batch size, workers, devices, precision.

    Raises:
        ValueError: there is no room for them, or a picture does not open.
    """
    given_datasets = [one for one in datasets if one is not None]
    sources = list({id(source): source for one in given_datasets for source in one.sources}.values())
    with FrozenVisualEncoder(model, processor, args) as encoding:
        cache_writer = FeatureCacheWriter(encoding, sources, config)
        cache_writer.add(lambda: find_image_requests(given_datasets, sources, config))
        for evaluated in given_datasets[1:]:
            cache_writer.add(partial(find_blank_requests, evaluated, cache_writer.features))
    collate.dummy = make_dummy_features(processor, cache_writer.features)
    return tuple(None if one is None else CachedFeatureDataset(one, cache_writer.features) for one in datasets)


def make_dummy_features(processor: Any, features: ImageFeatures) -> tuple[list[int], dict[str, Tensor]]:
    """The dummy image of batches without pictures, its features in place of its pixels."""
    ids, inputs = dummy_image(processor)
    seen = [require_cached_image(features, dummy_key(processor))]
    return ids, make_feature_inputs(features, seen, tiled="image_views" in inputs)


def dummy_key(processor: Any) -> bytes:
    """The key of the picture that the dummy is."""
    return blank_image_cache_key(BLANK_SIZE, dummy_view_kind(processor))


def dummy_view_kind(processor: Any) -> str:
    """How it is seen."""
    return FRAME_VIEW if processor.pools_video_frames else SQUARE_VIEW


def find_image_requests(
    datasets: Sequence[SampleDataset], sources: Sequence[Source], config: DatasetConfig
) -> dict[bytes, FeatureRequest]:  # fmt: skip
    """The distinct pictures of datasets, and the blank one of a dummy."""
    processor = datasets[0].processor
    found = {dummy_key(processor): FeatureRequest(BLANK_SOURCE, 0, 0, dummy_view_kind(processor))}
    for dataset in datasets:
        numbers = [next(n for n, one in enumerate(sources) if one is source) for source in dataset.sources]
        places = np.unique(dataset.places[dataset.num_images > 0], axis=0).tolist()
        for source, record in tqdm(places, "looking for pictures", leave=False, disable=None):
            try:
                sample = dataset.sources[source].sample(record)
                kinds = view_kinds(sample, processor)
                keys = [image_cache_key(one, kind) for one, kind in zip(sample.images, kinds, strict=True)]
            except (BadSample, OSError) as error:
                problem = error if isinstance(error, BadSample) else BadSample("?", str(error))
                raise_unless_skipped(problem, dataset.sources[source], record, config)
                continue  # the record is left out when its turn comes
            for place, (key, kind) in enumerate(zip(keys, kinds, strict=True)):
                found.setdefault(key, FeatureRequest(numbers[source], record, place, kind))
    return found


def find_blank_requests(dataset: SampleDataset, features: ImageFeatures) -> dict[bytes, FeatureRequest]:
    """The blank pictures that stand for those of a dataset."""
    found = {}
    for index in np.flatnonzero(dataset.num_images).tolist():
        try:
            sample = dataset.sample(index)
            seen = find_cached_images(sample, dataset.processor, features)
        except BadSample:  # evaluation refuses it before it comes to blank pictures
            continue
        for key, size, kind in make_blank_keys(sample, seen, dataset.processor):
            found.setdefault(key, FeatureRequest(BLANK_SOURCE, 0, 0, kind, size))
    return found
