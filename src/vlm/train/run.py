"""One run, told as a story."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import set_seed

from vlm.adapters.base import base_of
from vlm.config.head_problems import head_keys, row_keys
from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset
from vlm.data.encode import render
from vlm.data.files import attempt
from vlm.data.pictures import open_pictures
from vlm.data.sample import BadSample, Sample, Turn
from vlm.data.video import OpenVideo
from vlm.inference.generate import VisionLanguageModel
from vlm.models import VLMConfig
from vlm.train.arguments import training_arguments
from vlm.train.callbacks import EpochOrder, MetricsFile, SampleAnswers, StopAtNaN
from vlm.train.data import collator_of, first_samples, load_data
from vlm.train.model import compute_dtype, load_weights, prepare, settle_model
from vlm.train.parts import table
from vlm.train.plots import write_answers, write_first_batch
from vlm.train.run_directory import (
    SkippedRecords,
    choose_directory,
    contribution_table,
    describe,
    describe_data,
)
from vlm.train.trainer import VLMTrainer, checkpoint_to_resume

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
    args = training_arguments(config.trainer, [*head_keys(config), *row_keys(config)])
    args.output_dir = str(folder := choose_directory(config, name))
    if first := args.process_index == 0:
        describe(folder, config)
    if config.model.head.task is not None:
        from vlm.train.head_run import train_head  # its measures take seconds to import

        return train_head(config, folder, args, model_config, processor)

    train_data, eval_data = load_data(config, model_config, processor, args)
    if first:
        resumed = checkpoint_to_resume(config, folder) is not None
        describe_data(folder, {"train": train_data, "eval": eval_data}, resumed=resumed)
    if isinstance(train_data, SampleDataset):
        log.info("Training data:\n\n%s\n", contribution_table(train_data.contributions))

    set_seed(args.seed)
    model = load_weights(config, model_config, processor, compute_dtype(args), args.seed)
    parts = prepare(model, config, args, processor)
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


def answerer(config: RunConfig, trainer: VLMTrainer, processor: Any, samples: list[Sample], folder: Path) -> Any:
    """What answers a few samples into `samples.md`. All ranks generate, since ZeRO-3 needs them; rank 0 writes.

    Samples of which a template leaves no prompt (`plain`, text only), or whose pictures are torn, are passed over.
    """
    samples = [sample for sample in samples if any(turn.role == "assistant" for turn in sample.turns)]
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
