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

from vlm.assembly.adapter_base import base_of
from vlm.assembly.heads import renewed, settle_heads
from vlm.assembly.settle import load_weights
from vlm.config.derived import caches, heads_of
from vlm.config.schema import RunConfig
from vlm.data.cache import cache_folder
from vlm.data.dataset import Skipped
from vlm.data.heads.dataset import BlankHeadDataset, HeadCollator, HeadDataset
from vlm.evaluation.calibration import calibrate
from vlm.models import VLMConfig, VLMForPrediction
from vlm.models.modeling_prediction import built_head
from vlm.train.data import collator_of
from vlm.train.feature_cache.fingerprints import body_digest
from vlm.train.heads.data import HeadData, load_head_data, targets_of
from vlm.train.heads.feature_cache import FeatureDataset, Features, computed, lay_out
from vlm.train.heads.report import report
from vlm.train.heads.trainer import HeadTrainer, Said
from vlm.train.model import compute_dtype, prepare
from vlm.train.monitor.callbacks import EpochOrder, MetricsFile, StopAtNaN
from vlm.train.monitor.plots import write_first_batch
from vlm.train.monitor.speed import SpeedMeter
from vlm.train.parts import Part, table
from vlm.train.run_directory import SkippedRecords, contribution_table, describe_data
from vlm.train.signals import StopWhenAsked
from vlm.train.trainer import checkpoint_to_resume

log = logging.getLogger(__name__)

NOT_COUNTED = "they are of replies, and prediction heads read hidden states"
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
        describe_data(folder, data.roles(), resumed=checkpoint_to_resume(config, folder) is not None)
    log.info("Training data:\n\n%s\n", contribution_table(data.train.contributions))
    log.info("Records:\n\n%s\n", data.as_text())

    settled = settle_heads(config.model, body_config, processor, data.heads, targets_of(data.heads, data.train))
    set_seed(args.seed)  # what the body draws depends on no head: what is read of it stays in the cache
    model = load_weights(config, body_config, processor, compute_dtype(args), args.seed)
    model = with_heads(model, settled, args.seed)
    parts = prepare(model, config, args, processor)
    log.info("Run directory: %s\n\n%s\n", folder, table(parts))

    every = [data.train.dataset, *(None if one is None else one.dataset for one in (data.evaluation, data.test))]
    collate = HeadCollator(collator_of(processor, every, args.world_size, facts=False), data.heads)
    if first:
        show_first(data.train, collate, processor, folder, args.train_batch_size)
    read = reader(config, model, data, collate, args, folder)

    trainer_of = partial(
        head_trainer, config, model, processor, collate, folder, composed=isinstance(body_config, VLMConfig)
    )

    chosen_by = None
    if data.folds:
        again = partial(prepare, model, config, args, processor)  # the parts of fresh heads
        chosen_by, parts = out_of_folds(model, data, read, args, folder, trainer_of, again)
    train, evaluated = read(data.train), None if data.evaluation is None else read(data.evaluation)
    if evaluated is None:
        args.eval_strategy = "no"
    trainer = trainer_of(train, evaluated, args, folder, parts)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, folder))
    if evaluated is not None:
        chosen_by = trainer.ask(evaluated)
    assert chosen_by is not None
    settle_decisions(model, chosen_by, config)
    tested = None if data.test is None else trainer.ask(read(data.test))
    measured = data.test or data.evaluation
    seeing = measured is not None and measured.num_images.any()
    blank = trainer.ask(read(BlankHeadDataset(measured.dataset, data.heads))) if seeing else None
    if first:
        report(folder, model.config.settings, targets_of(data.heads, data.train), chosen_by, tested, blank,
               out_of_folds=bool(data.folds))  # fmt: skip
    trainer.save_model(str(folder / "final"))
    log.info("Done. Ask it:  vlm predict %s --image FILE --prompt PROMPT", folder / "final")
    return folder


def head_trainer(
    config: RunConfig, model: VLMForPrediction, processor: Any, collate: HeadCollator, folder: Path, train: Any,
    evaluated: Any, args: TrainingArguments, where: Path, parts: list[Part], *, composed: bool,
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
        where: the folder for measures: the run directory, or a fold's.
        parts: the model's.
        composed: whether the body is a model of this framework.
    """
    cached = isinstance(train, FeatureDataset)
    records = train.samples if isinstance(train, FeatureDataset) else train
    trainer = HeadTrainer(
        model=model, processor=processor, args=without_workers(args) if cached else args, parts=parts,
        base=base_of(config, composed=composed), loss_average="micro_batch",
        sampling="random" if cached else config.trainer.train_sampling_strategy,  # pyright: ignore[reportAttributeAccessIssue] - passed through
        on_skipped=SkippedRecords(folder, records.dataset, config.dataset, args.world_size),
        data_collator=lay_out if cached else collate, train_dataset=train, eval_dataset=evaluated,
        callbacks=[MetricsFile(where), StopAtNaN(), StopWhenAsked(saves=where == folder)],
        meter=SpeedMeter(args.device, note=NOT_COUNTED, folder=where if args.process_index == 0 else None),
    )  # fmt: skip
    trainer.add_callback(EpochOrder(lambda: trainer.order))
    return trainer


def with_heads(model: Any, settled: Any, seed: int) -> VLMForPrediction:
    """A body with fresh heads, which depend on `seed` alone; or a model with heads, trained as `settled` says."""
    if isinstance(model, VLMForPrediction):
        heads = model.heads.state_dict()
        model = VLMForPrediction(renewed(settled, model.config.settings), model.body)
        model.heads.load_state_dict(heads)
        return model
    torch.manual_seed(seed)
    return VLMForPrediction(settled, model)


def reader(
    config: RunConfig, model: VLMForPrediction, data: HeadData, collate: HeadCollator, args: TrainingArguments,
    folder: Path,
) -> Callable[[HeadDataset], Any]:  # fmt: skip
    """What makes of samples what the trainer takes: themselves, or where the body stays, what heads read of them."""
    if not caches(config):
        return lambda dataset: dataset
    tell = SkippedRecords(folder, data.train.dataset, config.dataset, 1, writes=args.process_index == 0)
    features: dict[int, Features] = {}
    find = partial(
        computed, model, body_digest(model), collate=collate, args=args, cache=cache_folder(config.dataset.cache_dir)
    )
    for one in data.every:
        features[id(one.dataset.sources[0])] = find(one, on_skipped=tell)  # what is held out has the same source

    def read(dataset: HeadDataset) -> FeatureDataset:
        blank = isinstance(dataset, BlankHeadDataset)
        found = find(dataset) if blank else features[id(dataset.dataset.sources[0])]
        return FeatureDataset(dataset, found, model.config.settings)

    return read


def without_workers(args: TrainingArguments) -> TrainingArguments:
    """The same, for rows that lie in memory: data workers would take longer to start than to read them."""
    args = copy.copy(args)
    args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None
    args.dataloader_persistent_workers = False
    return args


def out_of_folds(
    model: VLMForPrediction, data: HeadData, read: Callable[[HeadDataset], Any], args: TrainingArguments, folder: Path,
    trainer_of: Callable[..., HeadTrainer], prepare_again: Callable[[], list[Part]],
) -> tuple[dict[str, Said], list[Part]]:  # fmt: skip
    """What heads say of records that they were not trained on, fold by fold; afterwards they are fresh again.

    Returns:
        Head -> what was said of all records; and the model's parts, which hold the fresh heads.
    """
    fresh = copy.deepcopy(model.heads.state_dict())
    said: list[dict[str, Said]] = []
    for number, (rest, held) in enumerate(data.folds):
        log.info("Fold %d of %d", number + 1, len(data.folds))
        where = folder / "folds" / str(number)
        where.mkdir(parents=True, exist_ok=True)
        quiet = copy.copy(args)
        quiet.output_dir, quiet.eval_strategy, quiet.save_strategy, quiet.report_to = str(where), "no", "no", []
        renew_heads(model, fresh)
        trainer = trainer_of(read(rest), None, quiet, where, prepare_again())
        args.deepspeed_plugin = None  # accelerate keeps that of the first trainer, and refuses it to all others
        trainer.train()
        said.append(trainer.ask(read(held)))
    renew_heads(model, fresh)
    return {one.name: _joined([part[one.name] for part in said]) for one in model.config.settings}, prepare_again()


def renew_heads(model: VLMForPrediction, state: dict[str, torch.Tensor]) -> None:
    """Give a model new heads with these weights: none that an earlier optimiser or rank still holds on to."""
    width = model.config.get_text_config().hidden_size
    model.heads = torch.nn.ModuleDict({one.name: built_head(one, width) for one in model.config.settings})
    model.heads.load_state_dict(state)


def _joined(parts: Sequence[Said]) -> Said:
    """What was said of several sets of samples, as of one."""
    sizes = [len(part.outputs) for part in parts]
    compared = [part.compared for part in parts if part.compared is not None]
    return Said(
        np.concatenate([part.outputs for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate(compared) if compared else None,
        loss=float(np.average([part.loss for part in parts], weights=sizes)),
    )


def settle_decisions(model: VLMForPrediction, said: dict[str, Said], config: RunConfig) -> None:
    """Choose each head's temperature and threshold by what it says of the evaluation records."""
    asked = heads_of(config.model.head)
    settled = []
    for one in model.config.settings:
        found = said[one.name]
        chosen = calibrate(one.task, found.outputs, found.targets, asked[one.name].threshold_by)
        settled.append(asdict(replace(one, temperature=chosen.temperature, threshold=chosen.threshold)))
    model.config.heads = settled


def show_first(dataset: HeadDataset, collate: HeadCollator, processor: Any, folder: Path, number: int) -> None:
    """`first_batch.html`: the first prompts as the model sees them."""
    items = [dataset[index] for index in range(min(number, len(dataset), 8))]
    batch = collate.collate([{key: value for key, value in one.items() if key not in ("targets", "group")}
                             for one in items if not isinstance(one, Skipped)])  # fmt: skip
    if "pixel_values" in batch:
        batch["pixel_values"] = processor.normalise(batch["pixel_values"])
    write_first_batch(batch, processor, folder)
