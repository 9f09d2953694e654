"""The samples of a run, and how batches are laid out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import TrainingArguments

from vlm.config.schema import RunConfig
from vlm.data.batching.collator import DEDUPLICATED_INPUTS, Collator
from vlm.data.dataset import SampleDataset, dummy_image, dummy_video, load_dataset, split_off_eval
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import Sample
from vlm.data.stream import SampleStream, open_stream
from vlm.models import VLMProcessor


def load_data(
    config: RunConfig, model_config: Any, processor: Any, args: TrainingArguments
) -> tuple[SampleDataset | SampleStream, SampleDataset | None]:
    """The training and the evaluation samples."""
    data = config.dataset
    encoder = make_sample_encoder(config, model_config, processor)
    held_out = None
    if data.eval_path:
        folder = data.eval_image_folder or data.image_folder
        evaluated = replace(data, path=data.eval_path, image_folder=folder, sources={}, max_samples=None)
        held_out = load_dataset(evaluated, encoder, first=data.max_eval_samples, evaluates=True)
    if data.streaming:
        rank, world_size = args.process_index, args.world_size
        return open_stream(data, encoder, seed=args.seed, rank=rank, world_size=world_size), held_out
    train = load_dataset(data, encoder, seed=args.seed)
    if data.eval_split:
        train, held_out = split_off_eval(train, data.eval_split, args.seed)
        held_out = held_out.subset(range(len(held_out))[: data.max_eval_samples])
    return train, held_out


def make_sample_encoder(config: RunConfig, model_config: Any, processor: Any) -> SampleEncoder:
    """What encodes the samples of a run: at most as long as it says, and as the language model has positions."""
    positions = model_config.get_text_config().max_position_embeddings
    longest = min(config.dataset.max_length or positions, positions)
    return SampleEncoder(processor, longest, truncate=config.dataset.over_length == "truncate")


def make_collator(
    processor: Any, data: Sequence[SampleDataset | SampleStream | None], world_size: int, *, with_stats: bool = True
) -> Collator:
    """What lays samples out so that every rank makes the same calls: a dummy of whatever a batch has none of.

    Of equal images a composed model sees the first one. With `facts`, batches say what they hold, for the training loop
    to take out.
    """
    shown = any(one is not None and one.has_videos for one in data) and processor.encodes_videos_separately
    video = dummy_video(processor) if shown and world_size > 1 else None
    deduplicate = DEDUPLICATED_INPUTS if isinstance(processor, VLMProcessor) else ()
    return Collator.of(
        processor, dummy_image(processor), video_dummy=video, with_stats=with_stats, deduplicate=deduplicate
    )


def first_samples(dataset: SampleDataset | SampleStream, num_samples: int) -> list[Sample]:
    """The first samples of a dataset."""
    if isinstance(dataset, SampleStream):
        return dataset.samples(num_samples)
    return [dataset.sample(index) for index in range(min(num_samples, len(dataset)))]
