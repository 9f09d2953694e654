"""One run, told as a story."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from vlm.adapters.base import base_of
from vlm.adapters.folder import is_on_base
from vlm.adapters.folder import load as load_on_base
from vlm.anyres import settle_anyres
from vlm.build import (
    build_model,
    family_recipe,
    load_config,
    load_family,
    load_model,
    load_processor,
    open_model,
    recipe_differences,
)
from vlm.config.schema import ModelConfig, RunConfig, from_mapping
from vlm.data.collate import Collator
from vlm.data.dataset import SampleDataset, dummy_image, dummy_video, load_dataset, split_dataset
from vlm.data.encode import render
from vlm.data.files import attempt
from vlm.data.pictures import open_pictures
from vlm.data.sample import BadSample, Sample, Turn
from vlm.data.sources import SampleEncoder
from vlm.data.stream import SampleStream, open_stream
from vlm.data.video import OpenVideo
from vlm.encoders import image_size
from vlm.inference.generate import VisionLanguageModel
from vlm.models import VLMConfig
from vlm.quantization import compute_in, kinds_of
from vlm.train.arguments import training_arguments
from vlm.train.callbacks import EpochOrder, MetricsFile, SampleAnswers, StopAtNaN
from vlm.train.lora import add_adapter
from vlm.train.parts import cast, freeze, split_parts, table
from vlm.train.plots import write_answers, write_first_batch
from vlm.train.run_directory import (
    SkippedRecords,
    choose_directory,
    contribution_table,
    describe,
    describe_data,
)
from vlm.train.trainer import VLMTrainer, newest_checkpoint

log = logging.getLogger(__name__)


def run(config: RunConfig, name: str, overrides: Sequence[str] = ()) -> Path:
    """Build or load the model, train it, leave a run directory behind.

    Args:
        config: the resolved configuration.
        name: the configuration's name, for the run directory.
        overrides: the keys set on the command line; a checkpoint's architecture may not be contradicted by them.

    Returns:
        The run directory; its `final` holds the model: complete, or on top of its base.
    """
    model_config, processor = settle_model(config, overrides)
    args = training_arguments(config.trainer)
    args.output_dir = str(folder := choose_directory(config, name))
    if first := args.process_index == 0:
        describe(folder, config)

    train_data, eval_data = load_data(config, model_config, processor, args)
    if first:
        resumed = checkpoint_to_resume(config, folder) is not None
        describe_data(folder, {"train": train_data, "eval": eval_data}, resumed=resumed)
    if isinstance(train_data, SampleDataset):
        log.info("Training data:\n\n%s\n", contribution_table(train_data.contributions))

    set_seed(args.seed)
    model = load_weights(config, model_config, processor, compute_dtype(args), args.seed)
    trained_dtype = torch.float32 if args.deepspeed is None else compute_dtype(args)
    add_adapter(model, config.trainer.lora, args.seed, trained_dtype)
    parts = split_parts(model, config.trainer, config.model)
    freeze(parts)
    if not is_deepspeed_zero3_enabled():
        cast(model, parts, trained_dtype, compute_dtype(args))
    compute_in(model, compute_dtype(args))
    log.info("Run directory: %s\n\n%s\n", folder, table(parts))

    trainer = VLMTrainer(
        model=model,
        processor=processor,
        args=args,
        parts=parts,
        base=base_of(config, composed=isinstance(model_config, VLMConfig)),
        loss_average=config.trainer.loss_average,
        sampling=config.trainer.train_sampling_strategy,  # pyright: ignore[reportAttributeAccessIssue] - passed through
        on_first_batch=(lambda batch: write_first_batch(batch, processor, folder)) if first else None,
        on_skipped=SkippedRecords(folder, train_data, config.dataset, args.world_size),
        data_collator=collator_of(processor, [train_data, eval_data], args.world_size),
        train_dataset=train_data,
        eval_dataset=eval_data,
        callbacks=[MetricsFile(folder), StopAtNaN()],
    )
    trainer.add_callback(EpochOrder(lambda: trainer.order))
    if config.trainer.num_samples:
        shown = first_samples(eval_data or train_data, config.trainer.num_samples)
        trainer.add_callback(SampleAnswers(answerer(config, trainer, processor, shown, folder)))
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, folder))
    trainer.save_model(str(folder / "final"))
    log.info("Done. Ask it:  vlm generate %s --image FILE --prompt 'What is in this picture?'", folder / "final")
    return folder


def settle_model(config: RunConfig, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """Configuration and processor of the model, from parts or from a checkpoint, without weights.

    With `trainer.from_pretrained`, `config.model` becomes what the checkpoint was built with.

    Raises:
        ValueError: the parts do not fit, or the command line contradicts the checkpoint.
    """
    checkpoint = config.trainer.from_pretrained
    template, image_mode = config.dataset.template, config.dataset.image_mode
    touched = [key.removeprefix("model.") for key in overrides if key.startswith("model.")]
    if not checkpoint:
        if config.model.hf_name is not None:
            refuse_parts(touched, f"model.hf_name={config.model.hf_name}")
        found = open_model(config.model, template, image_mode)
        if config.model.hf_name is not None:
            config.model = family_recipe(config.model, config.model.hf_name, found[0].model_type)
        return found
    if {"model", "model.hf_name", "model.revision"} & set(overrides):
        raise ValueError(
            f"trainer.from_pretrained={checkpoint} and model.hf_name={config.model.hf_name}: both say what to begin "
            "with; choose one"
        )
    named = config.model.connector.type if "connector" in touched or "connector.type" in touched else None
    model_config = load_config(checkpoint, named)
    if not isinstance(model_config, VLMConfig):
        refuse_parts(touched, f"trainer.from_pretrained={checkpoint}")
        config.model = family_recipe(replace(config.model, revision=None), checkpoint, model_config.model_type)
        return open_model(config.model, template, image_mode)
    if different := recipe_differences(model_config, config.model, touched):
        said = "; ".join(f"{key}={wanted!r}, but the checkpoint has {has!r}" for key, wanted, has in different)
        raise ValueError(f"trainer.from_pretrained={checkpoint}: its architecture is fixed. You asked for {said}")
    processor = load_processor(checkpoint, template, image_mode)
    if is_on_base(checkpoint) and config.model.anyres.grids is not None:
        raise ValueError(
            f"model.anyres.grids: {checkpoint} is an adapter on its base, which keeps how it sees pictures; merge them "
            "first, or leave model.anyres.grids=null"
        )
    settle_anyres(model_config, processor, config.model.anyres, image_size(processor.image_processor))
    attention, quantised = config.model.attn_implementation, kinds_of(config.model)
    config.model = from_mapping(ModelConfig, model_config.recipe)
    config.model.attn_implementation = attention
    for part, kind in quantised.items():
        getattr(config.model, part).quantization = kind
    return model_config, processor


def refuse_parts(touched: Sequence[str], whole: str) -> None:
    """Refuse keys of the command line that would change a part of a whole model.

    Raises:
        ValueError: there is one.
    """
    free = ("hf_name", "revision", "trust_remote_code", "attn_implementation", "visual_encoder.quantization",
            "language_model.quantization", "connector.name")  # fmt: skip
    if fixed := [key for key in touched if key not in free]:
        raise ValueError(f"{whole} is a whole model: its parts are fixed. You asked for model.{fixed[0]}")


def load_weights(config: RunConfig, model_config: Any, processor: Any, dtype: torch.dtype, seed: int) -> Any:
    """The model with its weights. Without DeepSpeed, parts that train are loaded in float32."""
    dtype = dtype if config.trainer.deepspeed else torch.float32
    checkpoint, attention = config.trainer.from_pretrained, config.model.attn_implementation
    if checkpoint and is_on_base(checkpoint):
        return load_on_base(checkpoint, dtype=dtype, attn_implementation=attention)
    if not isinstance(model_config, VLMConfig):
        return load_family(config.model, model_config, dtype)
    if checkpoint:
        return load_model(checkpoint, model_config, dtype, attention, kinds_of(config.model))
    return build_model(config.model, model_config, processor, dtype, seed)


def load_data(
    config: RunConfig, model_config: Any, processor: Any, args: TrainingArguments
) -> tuple[SampleDataset | SampleStream, SampleDataset | None]:
    """The training and the evaluation samples."""
    data = config.dataset
    encoder = sample_encoder(config, model_config, processor)
    held_out = None
    if data.eval_path:
        folder = data.eval_image_folder or data.image_folder
        evaluated = replace(data, path=data.eval_path, image_folder=folder, sources={}, max_samples=None)
        held_out = load_dataset(evaluated, encoder, first=data.max_eval_samples, evaluates=True)
    if data.streaming:
        rank, ranks = args.process_index, args.world_size
        return open_stream(data, encoder, seed=args.seed, rank=rank, world_size=ranks), held_out
    train = load_dataset(data, encoder, seed=args.seed)
    if data.eval_split:
        train, held_out = split_dataset(train, data.eval_split, args.seed)
        held_out = held_out.subset(range(len(held_out))[: data.max_eval_samples])
    return train, held_out


def sample_encoder(config: RunConfig, model_config: Any, processor: Any) -> SampleEncoder:
    """What encodes the samples of a run: at most as long as it says, and as the language model has positions."""
    positions = model_config.get_text_config().max_position_embeddings
    longest = min(config.dataset.max_length or positions, positions)
    return SampleEncoder(processor, longest, truncate=config.dataset.over_length == "truncate")


def collator_of(processor: Any, data: Sequence[SampleDataset | SampleStream | None], world_size: int) -> Collator:
    """What lays samples out so that every rank makes the same calls: a dummy of whatever a batch has none of."""
    shown = any(one is not None and one.has_videos for one in data) and processor.reads_videos_apart
    video = dummy_video(processor) if shown and world_size > 1 else None
    return Collator.of(processor, dummy_image(processor), video_dummy=video)


def first_samples(dataset: SampleDataset | SampleStream, most: int) -> list[Sample]:
    """The first samples of a dataset."""
    if isinstance(dataset, SampleStream):
        return dataset.samples(most)
    return [dataset.sample(index) for index in range(min(most, len(dataset)))]


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """What matrix products run in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def checkpoint_to_resume(config: RunConfig, folder: Path) -> str | None:
    """What `trainer.resume_from_checkpoint` stands for."""
    wanted = config.trainer.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    return str(newest_checkpoint(folder)) if wanted.lower() == "true" else wanted


def answerer(config: RunConfig, trainer: VLMTrainer, processor: Any, samples: list[Sample], folder: Path) -> Any:
    """What answers a few samples into `samples.md`. All ranks generate, since ZeRO-3 needs them; rank 0 writes.

    Samples of which a template leaves no prompt (`plain`, text only), or whose pictures are torn, are passed over.
    """
    samples = [sample for sample in samples if render(processor, _until_last_reply(sample.turns), prompt=True).text]
    opened = [(sample, attempt(open_pictures, sample)) for sample in samples]
    samples = [sample for sample, found in opened if not isinstance(found, BadSample)]
    pictures = [found for _, found in opened if not isinstance(found, BadSample)]
    prompts = [_until_last_reply(sample.turns) for sample in samples]
    # A prompt that ends before the last reply may not show the last pictures.
    shown = [found[: sum(not isinstance(part, str) for turn in turns for part in turn.content)]
             for found, turns in zip(pictures, prompts, strict=True)]  # fmt: skip

    def answer(step: int) -> None:
        if not samples:
            return
        training = trainer.model.training
        trainer.model.eval()
        ready = VisionLanguageModel(trainer.model, processor)
        with trainer.compute_loss_context_manager():
            answers = ready.answer(prompts, shown, config.inference, synced_gpus=dist.is_initialized())
        trainer.model.train(training)
        if trainer.is_world_process_zero():
            rows = [
                (
                    _spoken(turns[-1:]),
                    _spoken(sample.turns[len(turns) : len(turns) + 1]),
                    said,
                    _to_show(found),
                )
                for turns, sample, said, found in zip(prompts, samples, answers, shown, strict=True)
            ]
            write_answers(step, rows, folder)

    return answer


def _until_last_reply(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation up to its last reply, which is left for the model to give."""
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    return list(turns[:last])


def _to_show(opened: Sequence[Any]) -> Any:
    """The first picture of a sample, or of its first video; None where it has neither."""
    first = next(iter(opened), None)
    return first.frames[0] if isinstance(first, OpenVideo) else first


def _spoken(turns: Sequence[Turn]) -> str:
    return "".join(part for turn in turns for part in turn.content if isinstance(part, str))
