"""The samples of a run, and the collator of its batches."""

from collections.abc import Iterable
from dataclasses import replace

from transformers import PreTrainedConfig, TrainingArguments

from vlm.assembly.language_models import max_positions
from vlm.config.choices import GROUP_BY_MODALITY_LENGTH
from vlm.config.schema import DatasetConfig, InferenceConfig
from vlm.data.batching.collator import Collator
from vlm.data.batching.samplers import ModalityBlockSampler, ModalityLengthSampler
from vlm.data.blank_images import dummy_image, dummy_video
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import NO_LIMIT, SampleEncoder
from vlm.data.encoding.thinking import is_thinking_asked
from vlm.data.holdout import split_off_eval
from vlm.data.processor import Processor
from vlm.data.sample import Sample
from vlm.data.stream import SampleStream, open_stream
from vlm.models.processing_messages import knows_thinking, set_thinks
from vlm.train.arguments import sampler_seed

NUM_PEEKED = 20
"""Number of samples of a stream that tell whether its records have thinking."""


def load_data(
    config: DatasetConfig, encoder: SampleEncoder, args: TrainingArguments
) -> tuple[SampleDataset | SampleStream, SampleDataset | None]:
    """Return the training samples, and the evaluation samples where there are some."""
    held_out = None
    if config.eval_path:
        held_out = load_other_file(config, encoder, config.eval_path, config.eval_image_folder, config.max_eval_samples)
    if config.streaming:
        rank, world_size = args.process_index, args.world_size
        return open_stream(config, encoder, seed=args.seed, rank=rank, world_size=world_size), held_out
    train = load_dataset(config, encoder, seed=args.seed)
    if config.eval_split:
        train, held_out = split_off_eval(train, config.eval_split, args.seed)
        held_out = held_out.subset(range(len(held_out))[: config.max_eval_samples])
    return train, held_out


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
            "the lengths of a stream are not known before; set dataset.max_length"
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
    has_videos = any(dataset.has_videos for dataset in data) and processor.encodes_videos_separately
    video = dummy_video(processor) if has_videos and world_size > 1 else None
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
    samples = dataset.lengths, dataset.num_images, args.train_batch_size * num_chunks
    if strategy == GROUP_BY_MODALITY_LENGTH:
        return ModalityLengthSampler(*samples, sampler_seed(args), num_chunks)
    return ModalityBlockSampler(*samples, sampler_seed(args))
