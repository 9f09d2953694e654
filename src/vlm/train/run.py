"""One run from start to end: the model, its data, training, and the finished checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from vlm.assembly.private_names import check_private_names
from vlm.assembly.resolve import load_weights, resolve_model
from vlm.assembly.round_trip import check_round_trip
from vlm.assembly.saving import set_reply_ends
from vlm.config.derived import embedding_row_keys
from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset
from vlm.train.arguments import training_arguments
from vlm.train.checkpoints.find import checkpoint_to_resume
from vlm.train.checkpoints.world import World, check_world
from vlm.train.make_trainer import make_trainer
from vlm.train.model import compute_dtype, prepare
from vlm.train.objectives.base import PreparedRun
from vlm.train.objectives.table import make_objective
from vlm.train.parts import table
from vlm.train.run_directory import choose_directory, contribution_table, write_data_summary, write_run_files
from vlm.train.step.packing import check_packing_support

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
    check_private_names()
    objective = make_objective(config)
    model_config, processor = resolve_model(config, overrides)
    if config.trainer.packing:
        check_packing_support(model_config.model_type)
    args = training_arguments(config.trainer, [*objective.training_keys(), *embedding_row_keys(config)])
    args.output_dir = str(folder := choose_directory(config, name))
    if is_writer := args.process_index == 0:
        write_run_files(folder, config)

    data = objective.load_data(model_config, processor, args)
    checkpoint = checkpoint_to_resume(config, folder)
    check_world(checkpoint, World.of(config, args.world_size, objective.loss_average))
    if is_writer:
        write_data_summary(folder, data.records, resumed=checkpoint is not None)
    if isinstance(data.records["train"], SampleDataset):
        log.info("Training data:\n\n%s\n", contribution_table(data.records["train"].contributions))
    if data.summary:
        log.info("Records:\n\n%s\n", data.summary)

    set_seed(args.seed)  # no weight depends on what was drawn before
    model = load_weights(config, model_config, processor, compute_dtype(args), args.seed)
    model = objective.wrap_model(model, args)
    check_round_trip(model)
    set_reply_ends(model, processor)
    parts = prepare(model, config, args, processor)
    log.info("Run directory: %s\n\n%s\n", folder, table(parts))

    collate = objective.make_collator(processor, data, args)
    prepared = PreparedRun(folder, args, processor, model, parts, data, collate)
    objective.before_training(prepared)
    trainer = make_trainer(objective, prepared)
    trainer.train(resume_from_checkpoint=checkpoint)
    objective.after_training(prepared, trainer)
    trainer.save_model(str(folder / "final"))
    log.info("Done. Ask it:  %s", objective.next_command(folder / "final"))
    return folder
