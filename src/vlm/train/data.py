"""The samples of a run, and the collator of its batches."""

import logging
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np
from transformers import PreTrainedConfig, TrainingArguments

from vlm.assembly.language_models import max_positions
from vlm.config.choices import BEST_FIT, GROUP_BY_MODALITY_LENGTH
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.schema import InferenceConfig, RunConfig
from vlm.data.batching.collator import Collator
from vlm.data.batching.samplers import ModalityBlockSampler, ModalityLengthSampler
from vlm.data.blank_images import dummy_image, dummy_video
from vlm.data.counted_later import CountedLater, MeasuredLengths
from vlm.data.dataset import SampleDataset, draw_records, load_dataset, load_sources, repeat_by_weight
from vlm.data.encoding.sample_encoder import NO_LIMIT, SampleEncoder
from vlm.data.encoding.thinking import is_thinking_asked
from vlm.data.holdout import count_shared_images, split_off_eval
from vlm.data.overlap import check_overlap
from vlm.data.processor import Processor
from vlm.data.records.index import IndexedRecords
from vlm.data.records.listed_media import can_look_for_media, find_listed_media
from vlm.data.sample import Sample
from vlm.data.sources import Source, make_sources
from vlm.data.stream import SampleStream, open_stream
from vlm.data.token_counts import counts_file
from vlm.models.processing_messages import knows_thinking, set_thinks
from vlm.train.arguments import sampler_seed

log = logging.getLogger(__name__)

MANY_RECORDS = 20_000
"""From this number of records on, training does not wait until they are counted, where it need not."""
NUM_CHECKED_FIRST = 1024
"""Number of records of each source that are counted before training begins all the same: most mistakes are in all."""
ANY_LENGTHS = ("random", "sequential", GROUP_BY_MODALITY_LENGTH)
"""Orders in which it does not depend on lengths which samples a step has."""
NUM_PEEKED = 20
"""Number of samples of a stream that tell whether its records have thinking."""


def load_data(
    config: DatasetConfig,
    encoder: SampleEncoder,
    args: TrainingArguments,
    *,
    waits: bool = True,
    groups: bool = False,
) -> tuple[SampleDataset | SampleStream, SampleDataset | None]:
    """Return the training samples, and the evaluation samples where there are some.

    Without `waits`, training records may be counted later, where they are many and which samples there are is known;
    with `groups`, where it is known besides which of them have images or videos.
    """
    held_out = None
    if config.eval_path:
        held_out = load_other_file(config, encoder, config.eval_path, config.eval_image_folder, config.max_eval_samples)
    if config.streaming:
        rank, world_size = args.process_index, args.world_size
        return open_stream(config, encoder, seed=args.seed, rank=rank, world_size=world_size), held_out
    if not waits and (later := _count_later(config, encoder, args.seed, groups=groups)) is not None:
        check_overlap(config, later, held_out)
        return later, held_out
    train = load_dataset(config, encoder, seed=args.seed)
    if config.eval_split:
        train, held_out = split_off_eval(train, config.eval_split, args.seed)
        held_out = held_out.subset(range(len(held_out))[: config.max_eval_samples])
        if args.process_index == 0 and (shared := count_shared_images(train, held_out)):
            log.warning(
                "dataset.eval_split=%g: %d of %d held-out records have an image that training records have too. For "
                "an evaluation on new images give dataset.eval_path",
                config.eval_split,
                shared,
                len(held_out),
            )
    check_overlap(config, train, held_out)
    return train, held_out


def needs_counts(config: RunConfig, world_size: int) -> bool:
    """Return whether the first step of a run needs to know how long all of its training records are.

    It does where records may be left out, where lengths decide which samples a step has, where features of all images
    are computed first, and where several ranks compare what they have counted. `group_by_modality_length` divides the
    samples of a step by their lengths, and chooses them by whether they have images or videos. Other systems than Linux
    do not fork a process that has loaded their libraries.
    """
    data, trainer = config.dataset, config.trainer
    leaves_out = data.on_bad_sample != "error" or data.over_length != "error"
    fills_rows = trainer.packing and trainer.packing_strategy == BEST_FIT
    is_ordered = fills_rows or trainer.train_sampling_strategy not in ANY_LENGTHS
    uses_all = data.eval_split or data.cache_features
    return bool(leaves_out or is_ordered or uses_all or world_size > 1 or sys.platform != "linux")


def _count_later(
    config: DatasetConfig, encoder: SampleEncoder, seed: int, *, groups: bool = False
) -> CountedLater | None:
    """Return training samples whose records another process counts; None if that is no gain.

    With `groups`, None too if it takes as long to find out which samples have images or videos.

    Raises:
        ValueError: one of the first records cannot be used.
    """
    sources = make_sources(config, encoder)
    drawn = [draw_records(len(source), source.config.max_samples, seed) for source in sources]
    pairs = list(zip(sources, drawn, strict=True))
    known = all(counts_file(source, records, config.check_samples).exists() for source, records in pairs)
    if known or sum(map(len, drawn)) < MANY_RECORDS:
        return None
    listed = [_find_listed_media(source) for source in sources] if groups else None
    if listed is not None and any(found is None for found in listed):
        return None
    load_sources(sources, config, encoder, seed=seed, first=NUM_CHECKED_FIRST)
    log.info(
        "Training starts while records are still being counted; a record that cannot be used ends the run when it is "
        "found"
    )
    places = [
        np.stack([np.full(len(repeated), number), repeated], axis=1)
        for number, (source, records) in enumerate(pairs)
        for repeated in [records[repeat_by_weight(np.arange(len(records)), source.weight, seed)]]
    ]
    load = partial(load_sources, sources, config, encoder, seed=seed)
    if listed is None:
        return CountedLater(sources, np.concatenate(places), load)
    has_media = [found[rows[:, 1]] for found, rows in zip(listed, places, strict=True) if found is not None]
    return CountedLater(sources, np.concatenate(places), load, np.concatenate(has_media))


def _find_listed_media(source: Source) -> np.ndarray | None:
    """Return whether each record of a source has images or videos; None if only reading all of them would tell."""
    if not can_look_for_media(source.config) or not isinstance(source.records, IndexedRecords):
        return None
    return find_listed_media(source.records)


def load_other_file(
    config: DatasetConfig, encoder: SampleEncoder, path: str, image_folder: str | None, max_samples: int | None
) -> SampleDataset:
    """Return the records of an evaluation or test file, read as the training records are."""
    folder = image_folder or config.image_folder
    config = replace(config, path=path, image_folder=folder, sources={}, max_samples=None)
    return load_dataset(config, encoder, first=max_samples, evaluates=True)


def max_sample_length(config: DatasetConfig, model_config: PreTrainedConfig) -> int:
    """Return the most tokens of a sample: `dataset.max_length`, but no more than the language model has positions.

    Raises:
        ValueError: neither bounds the samples of a stream.
    """
    positions = max_positions(model_config)
    if config.streaming and config.max_length is None and positions == NO_LIMIT:
        raise ValueError(
            "dataset.max_length=null with dataset.streaming=true: this language model reads rows of any length, and "
            "the lengths of a stream are not known in advance; set dataset.max_length"
        )
    return min(config.max_length or positions, positions)


def set_thinking(processor: Processor, settings: InferenceConfig, train: SampleDataset | SampleStream) -> None:
    """Set whether the model is to think before its answers, which is saved with it: `inference.thinking`.

    Where that is null, it is to think once it is trained on records with thinking; of a stream, the first ones tell.
    """
    if settings.thinking is not None:
        set_thinks(processor.tokenizer, settings.thinking)
        return
    if isinstance(train, SampleStream):
        encoder = train.sources[0].encoder
        samples = first_samples(train, NUM_PEEKED) if knows_thinking(processor.chat_template) else []
        has_thinking = any(is_thinking_asked(encoder.with_thinking(sample).turns) for sample in samples)
    else:
        has_thinking = train.has_thinking
    if has_thinking:
        set_thinks(processor.tokenizer, True)


def make_collator(
    processor: Processor, data: Iterable[SampleDataset | SampleStream], world_size: int, *, with_stats: bool = True
) -> Collator:
    """Return what makes batches so that every rank makes the same calls: a dummy of whatever a batch has none of.

    For a composed model, equal images stand once in a batch. `with_stats` adds `BatchStats` for the training loop.
    """
    encodes_videos = world_size > 1 and processor.encodes_videos_separately
    video = dummy_video(processor) if encodes_videos and any(dataset.has_videos for dataset in data) else None
    return Collator.of(
        processor,
        dummy_image(processor),
        video_dummy=video,
        with_stats=with_stats,
        with_refs=True,
        deduplicate=processor.deduplicated_inputs,
    )


def first_samples(dataset: SampleDataset | SampleStream, num_samples: int) -> list[Sample]:
    """Return the first samples of a data set."""
    if isinstance(dataset, SampleStream):
        return dataset.samples(num_samples)
    return [dataset.sample(index) for index in range(min(num_samples, len(dataset)))]


def make_grouped_sampler(
    strategy: str, dataset: SampleDataset, args: TrainingArguments
) -> ModalityLengthSampler | ModalityBlockSampler:
    """Return the order of samples of one of `GROUPED_STRATEGIES`, by modality and length."""
    num_chunks = args.gradient_accumulation_steps * args.world_size
    if isinstance(dataset, CountedLater) and not dataset.is_counted and dataset.has_media is not None:
        assert strategy == GROUP_BY_MODALITY_LENGTH
        sizes = MeasuredLengths(dataset)
        batch = args.train_batch_size * num_chunks
        return ModalityLengthSampler(
            sizes.lengths, dataset.has_media, batch, sampler_seed(args), num_chunks, sizes.measure
        )
    samples = dataset.lengths, dataset.num_images, args.train_batch_size * num_chunks
    if strategy == GROUP_BY_MODALITY_LENGTH:
        return ModalityLengthSampler(*samples, sampler_seed(args), num_chunks)
    return ModalityBlockSampler(*samples, sampler_seed(args))
