"""One run, told as a story."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from vlm.assembly.adapter_base import make_base
from vlm.assembly.settle import load_weights, resolve_model
from vlm.config.derived import embedding_row_keys, head_keys
from vlm.config.schema import RunConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import SampleDataset
from vlm.evaluation.text_metrics import METRICS, check_metrics
from vlm.models import VLMConfig
from vlm.train.arguments import training_arguments
from vlm.train.data import first_samples, load_data, make_collator
from vlm.train.feature_cache.dataset import replace_images_with_features, require_composed_model
from vlm.train.model import compute_dtype, prepare
from vlm.train.monitor.callbacks import MetricsFile, SampleGenerationCallback, SetSamplerEpoch, StopAtNaN
from vlm.train.monitor.plots import write_first_batch
from vlm.train.monitor.profiler import ProfilerCallback
from vlm.train.parts import Part, table
from vlm.train.run_directory import (
    SkippedRecords,
    choose_directory,
    contribution_table,
    write_data_summary,
    write_run_files,
)
from vlm.train.sample_generation import generation_metrics, make_sample_generator
from vlm.train.signals import SigtermCheckpoint
from vlm.train.step.packing import check_packing_support
from vlm.train.timed_trainer import make_speed_meter
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
    check_metrics(config.trainer.eval_metrics, tuple(METRICS), "trainer.eval_metrics=")
    model_config, processor = resolve_model(config, overrides)
    args = training_arguments(config.trainer, [*head_keys(config), *embedding_row_keys(config)])
    args.output_dir = str(folder := choose_directory(config, name))
    if first := args.process_index == 0:
        write_run_files(folder, config)
    if config.model.head.task is not None:
        from vlm.train.heads.run import train_head  # its measures take seconds to import

        return train_head(config, folder, args, model_config, processor)

    if config.trainer.packing:
        check_packing_support(model_config.model_type)
    if config.dataset.cache_features:
        require_composed_model(model_config)
    train_data, eval_data = load_data(config, model_config, processor, args)
    if first:
        resumed = checkpoint_to_resume(config, folder) is not None
        write_data_summary(folder, {"train": train_data, "eval": eval_data}, resumed=resumed)
    if isinstance(train_data, SampleDataset):
        log.info("Training data:\n\n%s\n", contribution_table(train_data.contributions))

    set_seed(args.seed)
    model = load_weights(config, model_config, processor, compute_dtype(args), args.seed)
    parts = prepare(model, config, args, processor)
    collate = make_collator(processor, [train_data, eval_data], args.world_size)
    if config.dataset.cache_features:
        train_data, eval_data = replace_images_with_features(
            model, processor, [train_data, eval_data], collate, config.dataset, args
        )
    log.info("Run directory: %s\n\n%s\n", folder, table(parts))

    trainer = make_trainer(config, model, processor, parts, collate, train_data, eval_data, args, folder)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, folder))
    trainer.save_model(str(folder / "final"))
    log.info("Done. Ask it:  vlm generate %s --image FILE --prompt 'What is in this picture?'", folder / "final")
    return folder


def make_trainer(
    config: RunConfig, model: Any, processor: Any, parts: list[Part], collate: Collator, train_data: Any,
    eval_data: Any, args: TrainingArguments, folder: Path,
) -> VLMTrainer:  # fmt: skip
    """What trains a model, with all that it tells on the way.

    Args:
        config: the run's.
        model: the model, ready to train.
        processor: its processor.
        parts: its parts.
        collate: lays samples out.
        train_data: what trains.
        eval_data: what is evaluated on; None: nothing.
        args: the run's.
        folder: the run directory.
    """
    first = args.process_index == 0
    trainer = VLMTrainer(
        model=model,
        processor=processor,
        args=args,
        parts=parts,
        base=make_base(config, composed=isinstance(model.config, VLMConfig)),
        loss_average=config.trainer.loss_average,
        sampling=config.trainer.train_sampling_strategy,  # pyright: ignore[reportAttributeAccessIssue] - passed through
        packing=config.trainer.packing,
        max_tokens=config.trainer.max_tokens_per_batch,
        on_first_batch=(lambda batch: write_first_batch(batch, processor, folder)) if first else None,
        on_skipped=SkippedRecords(folder, train_data, config.dataset, args.world_size),
        data_collator=collate,
        train_dataset=train_data,
        eval_dataset=eval_data,
        generation_metrics=generation_metrics(config, eval_data, processor, args),
        callbacks=[MetricsFile(folder), StopAtNaN(), SigtermCheckpoint()],
        meter=make_speed_meter(model, processor, args, compute_dtype(args), config.trainer.peak_tflops, folder),
    )
    trainer.add_callback(SetSamplerEpoch(lambda: trainer.sampler))
    if config.trainer.profile and first:
        trainer.add_callback(
            ProfilerCallback(folder / "profile", model)
        )  # it ends before the answers at the end are drawn
    if config.trainer.num_samples:
        shown = first_samples(eval_data or train_data, config.trainer.num_samples)
        trainer.add_callback(SampleGenerationCallback(make_sample_generator(config, trainer, processor, shown, folder)))
    return trainer
