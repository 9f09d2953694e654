"""A run with prediction heads, told as a story: train, choose threshold and temperature, measure, save."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments, set_seed

from vlm.assembly.adapter_base import make_base
from vlm.assembly.heads import resolve_heads, with_checkpoint_scales
from vlm.assembly.settle import load_weights
from vlm.config.derived import caches_features, get_heads
from vlm.config.schema import RunConfig
from vlm.data.cache import resolve_cache_folder
from vlm.data.dataset import Skipped
from vlm.data.heads.dataset import BlankHeadDataset, HeadCollator, HeadDataset
from vlm.evaluation.calibration import calibrate
from vlm.models import VLMConfig, VLMForPrediction
from vlm.models.modeling_prediction import make_head
from vlm.train.data import make_collator
from vlm.train.feature_cache.fingerprints import body_digest
from vlm.train.heads.data import HeadData, load_head_data, targets_by_head
from vlm.train.heads.feature_cache import HeadFeatureDataset, HeadFeatures, collate_features, load_or_compute_features
from vlm.train.heads.report import report
from vlm.train.heads.trainer import HeadOutputs, HeadTrainer
from vlm.train.model import compute_dtype, prepare
from vlm.train.monitor.callbacks import MetricsFile, SetSamplerEpoch, StopAtNaN
from vlm.train.monitor.plots import write_first_batch
from vlm.train.monitor.speed import SpeedMeter
from vlm.train.parts import Part, table
from vlm.train.run_directory import SkippedRecords, contribution_table, write_data_summary
from vlm.train.signals import SigtermCheckpoint
from vlm.train.trainer import checkpoint_to_resume

log = logging.getLogger(__name__)

FLOPS_NOTE = "they are of replies, and prediction heads read hidden states"
"""Why a run's measures have no operations."""


def train_head(
    config: RunConfig, folder: Path, args: TrainingArguments, body_config: Any, processor: Any
) -> Path:  # fmt: skip
    """Train the heads of a run, and what else of the model it trains; the run directory is left complete.

    Args:
        config: the run's, its model settled.
        folder: the run directory.
        args: the run's.
        body_config: of the body.
        processor: the run's.
    """
    first = args.process_index == 0
    data = load_head_data(config, body_config, processor, args.seed)
    if first:
        write_data_summary(folder, data.datasets_by_role(), resumed=checkpoint_to_resume(config, folder) is not None)
    log.info("Training data:\n\n%s\n", contribution_table(data.train.contributions))
    log.info("Records:\n\n%s\n", data.summary())

    resolved = resolve_heads(config.model, body_config, processor, data.heads, targets_by_head(data.heads, data.train))
    set_seed(args.seed)  # what the body draws depends on no head: what is read of it stays in the cache
    model = load_weights(config, body_config, processor, compute_dtype(args), args.seed)
    model = attach_heads(model, resolved, args.seed)
    parts = prepare(model, config, args, processor)
    log.info("Run directory: %s\n\n%s\n", folder, table(parts))

    all_datasets = [data.train.dataset, *(None if one is None else one.dataset for one in (data.evaluation, data.test))]
    collate = HeadCollator(make_collator(processor, all_datasets, args.world_size, with_stats=False), data.heads)
    if first:
        write_first_head_batch(data.train, collate, processor, folder, args.train_batch_size)
    read = make_feature_reader(config, model, data, collate, args, folder)

    make_trainer = partial(
        head_trainer, config, model, processor, collate, folder, composed=isinstance(body_config, VLMConfig)
    )

    calibration_outputs = None
    if data.folds:
        rebuild = partial(prepare, model, config, args, processor)  # the parts of fresh heads
        calibration_outputs, parts = out_of_fold(model, data, read, args, folder, make_trainer, rebuild)
    train, evaluated = read(data.train), None if data.evaluation is None else read(data.evaluation)
    if evaluated is None:
        args.eval_strategy = "no"
    trainer = make_trainer(train, evaluated, args, folder, parts)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, folder))
    if evaluated is not None:
        calibration_outputs = trainer.collect_outputs(evaluated)
    assert calibration_outputs is not None
    calibrate_heads(model, calibration_outputs, config)
    tested = None if data.test is None else trainer.collect_outputs(read(data.test))
    measured = data.test or data.evaluation
    has_images = measured is not None and measured.num_images.any()
    blank = trainer.collect_outputs(read(BlankHeadDataset(measured.dataset, data.heads))) if has_images else None
    if first:
        report(folder, model.config.settings, targets_by_head(data.heads, data.train), calibration_outputs, tested, blank,
               out_of_fold=bool(data.folds))  # fmt: skip
    trainer.save_model(str(folder / "final"))
    log.info("Done. Ask it:  vlm predict %s --image FILE --prompt PROMPT", folder / "final")
    return folder


def head_trainer(
    config: RunConfig, model: VLMForPrediction, processor: Any, collate: HeadCollator, folder: Path, train: Any,
    evaluated: Any, args: TrainingArguments, output_dir: Path, parts: list[Part], *, composed: bool,
) -> HeadTrainer:  # fmt: skip
    """What trains on samples, or on what heads read of them.

    Args:
        config: the run's.
        model: the model.
        processor: its processor.
        collate: lays samples out.
        folder: the run directory.
        train: what trains, as `reader` gives it.
        evaluated: what is evaluated on meanwhile; None: nothing.
        args: the run's, or a fold's.
        output_dir: the folder for measures: the run directory, or a fold's.
        parts: the model's.
        composed: whether the body is a model of this framework.
    """
    cached = isinstance(train, HeadFeatureDataset)
    records = train.samples if isinstance(train, HeadFeatureDataset) else train
    trainer = HeadTrainer(
        model=model, processor=processor, args=disable_workers(args) if cached else args, parts=parts,
        base=make_base(config, composed=composed), loss_average="micro_batch",
        sampling="random" if cached else config.trainer.train_sampling_strategy,  # pyright: ignore[reportAttributeAccessIssue] - passed through
        on_skipped=SkippedRecords(folder, records.dataset, config.dataset, args.world_size),
        data_collator=collate_features if cached else collate, train_dataset=train, eval_dataset=evaluated,
        callbacks=[MetricsFile(output_dir), StopAtNaN(), SigtermCheckpoint(can_save=output_dir == folder)],
        meter=SpeedMeter(args.device, note=FLOPS_NOTE, folder=output_dir if args.process_index == 0 else None),
    )  # fmt: skip
    trainer.add_callback(SetSamplerEpoch(lambda: trainer.sampler))
    return trainer


def attach_heads(model: Any, resolved: Any, seed: int) -> VLMForPrediction:
    """A body with fresh heads, which depend on `seed` alone; or a model with heads, trained as `settled` says."""
    if isinstance(model, VLMForPrediction):
        heads = model.heads.state_dict()
        model = VLMForPrediction(with_checkpoint_scales(resolved, model.config.settings), model.body)
        model.heads.load_state_dict(heads)
        return model
    torch.manual_seed(seed)
    return VLMForPrediction(resolved, model)


def make_feature_reader(
    config: RunConfig, model: VLMForPrediction, data: HeadData, collate: HeadCollator, args: TrainingArguments,
    folder: Path,
) -> Callable[[HeadDataset], Any]:  # fmt: skip
    """What makes of samples what the trainer takes: themselves, or where the body stays, what heads read of them."""
    if not caches_features(config):
        return lambda dataset: dataset
    on_skipped = SkippedRecords(folder, data.train.dataset, config.dataset, 1, is_writer=args.process_index == 0)
    features: dict[int, HeadFeatures] = {}
    find = partial(
        load_or_compute_features,
        model,
        body_digest(model),
        collate=collate,
        args=args,
        cache=resolve_cache_folder(config.dataset.cache_dir),
    )
    for one in data.all_datasets:
        features[id(one.dataset.sources[0])] = find(one, on_skipped=on_skipped)  # what is held out has the same source

    def read(dataset: HeadDataset) -> HeadFeatureDataset:
        blank = isinstance(dataset, BlankHeadDataset)
        found = find(dataset) if blank else features[id(dataset.dataset.sources[0])]
        return HeadFeatureDataset(dataset, found, model.config.settings)

    return read


def disable_workers(args: TrainingArguments) -> TrainingArguments:
    """The same, for rows that lie in memory: data workers would take longer to start than to read them."""
    args = copy.copy(args)
    args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None
    args.dataloader_persistent_workers = False
    return args


def out_of_fold(
    model: VLMForPrediction, data: HeadData, read: Callable[[HeadDataset], Any], args: TrainingArguments, folder: Path,
    make_trainer: Callable[..., HeadTrainer], rebuild_parts: Callable[[], list[Part]],
) -> tuple[dict[str, HeadOutputs], list[Part]]:  # fmt: skip
    """What heads say of records that they were not trained on, fold by fold; afterwards they are fresh again.

    Returns:
        Head -> what was said of all records; and the model's parts, which hold the fresh heads.
    """
    initial_state = copy.deepcopy(model.heads.state_dict())
    head_outputs: list[dict[str, HeadOutputs]] = []
    for number, (rest, held) in enumerate(data.folds):
        log.info("Fold %d of %d", number + 1, len(data.folds))
        output_dir = folder / "folds" / str(number)
        output_dir.mkdir(parents=True, exist_ok=True)
        fold_args = copy.copy(args)
        fold_args.output_dir, fold_args.eval_strategy, fold_args.save_strategy, fold_args.report_to = (
            str(output_dir),
            "no",
            "no",
            [],
        )
        reset_heads(model, initial_state)
        trainer = make_trainer(read(rest), None, fold_args, output_dir, rebuild_parts())
        args.deepspeed_plugin = None  # accelerate keeps that of the first trainer, and refuses it to all others
        trainer.train()
        head_outputs.append(trainer.collect_outputs(read(held)))
    reset_heads(model, initial_state)
    return {
        one.name: _concatenate_outputs([part[one.name] for part in head_outputs]) for one in model.config.settings
    }, rebuild_parts()


def reset_heads(model: VLMForPrediction, state: dict[str, torch.Tensor]) -> None:
    """Give a model new heads with these weights: none that an earlier optimiser or rank still holds on to."""
    width = model.config.get_text_config().hidden_size
    model.heads = torch.nn.ModuleDict({one.name: make_head(one, width) for one in model.config.settings})
    model.heads.load_state_dict(state)


def _concatenate_outputs(parts: Sequence[HeadOutputs]) -> HeadOutputs:
    """What was said of several sets of samples, as of one."""
    sizes = [len(part.outputs) for part in parts]
    ranking_groups = [part.ranking_groups for part in parts if part.ranking_groups is not None]
    return HeadOutputs(
        np.concatenate([part.outputs for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate(ranking_groups) if ranking_groups else None,
        loss=float(np.average([part.loss for part in parts], weights=sizes)),
    )


def calibrate_heads(model: VLMForPrediction, head_outputs: dict[str, HeadOutputs], config: RunConfig) -> None:
    """Choose each head's temperature and threshold by what it says of the evaluation records."""
    requested_heads = get_heads(config.model.head)
    resolved = []
    for one in model.config.settings:
        found = head_outputs[one.name]
        chosen = calibrate(one.task, found.outputs, found.targets, requested_heads[one.name].threshold_by)
        resolved.append(asdict(replace(one, temperature=chosen.temperature, threshold=chosen.threshold)))
    model.config.heads = resolved


def write_first_head_batch(
    dataset: HeadDataset, collate: HeadCollator, processor: Any, folder: Path, number: int
) -> None:
    """`first_batch.html`: the first prompts as the model sees them."""
    items = [dataset[index] for index in range(min(number, len(dataset), 8))]
    batch = collate.collate([{key: value for key, value in one.items() if key not in ("targets", "group")}
                             for one in items if not isinstance(one, Skipped)])  # fmt: skip
    if "pixel_values" in batch:
        batch["pixel_values"] = processor.normalise(batch["pixel_values"])
    write_first_batch(batch, processor, folder)
