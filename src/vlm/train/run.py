"""One run from start to end: the model, its data, training, and the finished checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig, TrainingArguments

from vlm.assembly.family_trial.verdicts import Verdicts, read_unused
from vlm.assembly.private_names import check_private_names
from vlm.assembly.resolve import load_weights, resolve_model
from vlm.assembly.round_trip import check_round_trip
from vlm.assembly.saving import set_reply_ends
from vlm.config.derived import embedding_row_keys, shards_weights
from vlm.config.schema import RunConfig
from vlm.data.counted_later import CountedLater, when_counted
from vlm.data.dataset import SampleDataset
from vlm.data.processor import Processor
from vlm.data.progress import shows_bars
from vlm.runs.status_line import SAVING
from vlm.train.arguments import training_arguments
from vlm.train.checkpoints.world import World
from vlm.train.example_question import find_example_question
from vlm.train.extension_locks import extensions_folder, release_stale_locks
from vlm.train.family_trial import check_family, check_videos
from vlm.train.finish_counting import FinishCounting, counting
from vlm.train.make_trainer import make_trainer
from vlm.train.model import compute_dtype, prepare
from vlm.train.monitor.recording import quiet_bars, record_run
from vlm.train.monitor.run_log import RunLog, logged
from vlm.train.monitor.status import RunStatus
from vlm.train.next_steps import describe_next_steps
from vlm.train.objectives.base import Objective, PreparedRun, RunData
from vlm.train.objectives.table import make_objective
from vlm.train.parts import table
from vlm.train.random_state import seed_everything
from vlm.train.reporting import reporting, write_parts
from vlm.train.resume.directory import RunStart, open_run_directory
from vlm.train.resume.final import write_final
from vlm.train.resume.progress import RunProgress
from vlm.train.run_directory import choose_directory, contribution_table, describe_held_out
from vlm.train.sharding import check_same_calls
from vlm.train.world_check import check_same_data, check_same_setup

log = logging.getLogger(__name__)


def run(config: RunConfig, name: str, overrides: Sequence[str] = (), run_log: RunLog | None = None) -> Path:
    """Build or load the model, train it, leave a run directory behind; go on with a run that the directory holds.

    Args:
        config: the resolved configuration.
        name: the configuration's name, for the run directory.
        overrides: the keys set on the command line; a checkpoint's architecture may not be contradicted by them.
        run_log: takes what is logged already; None: it is taken from here on.

    Returns:
        The run directory; its `final` holds the model: complete, or on top of its base.

    Raises:
        ValueError: something has to be fixed by the user, see `resume/start.py` for the run directory.
    """
    with logged(run_log) as run_log, quiet_bars(shows_bars=shows_bars() and not config.trainer.disable_tqdm):
        return _run(config, name, overrides, run_log)


def _run(config: RunConfig, name: str, overrides: Sequence[str], run_log: RunLog) -> Path:
    check_private_names()
    objective = make_objective(config)
    model_config, processor = resolve_model(config, overrides)
    args = training_arguments(config.trainer, [*objective.training_keys(), *embedding_row_keys(config)])
    if args.world_size > 1 and shards_weights(config.trainer):
        check_same_calls(model_config)
    check_same_setup(config)
    verdicts = check_family(config, model_config, processor, objective.packing_proofs)
    if args.local_process_index == 0 and config.trainer.deepspeed:
        release_stale_locks(extensions_folder())
    args.output_dir = str(folder := choose_directory(config, name))
    args.run_name = args.run_name or folder.name  # its name in trackers
    if config.trainer.auto_batch:
        from vlm.train.preflight.auto_batch import set_auto_batch  # few runs have it

        set_auto_batch(objective, model_config, processor, args, folder)
    world = World.of(config, args.world_size, objective.loss_average)
    with open_run_directory(config, folder, world) as start:
        if config.trainer.preflight and not start.is_done and start.checkpoint is None:
            from vlm.train.preflight.before_run import write_preflight  # few runs have one

            write_preflight(config, name, overrides, folder)
        if not start.is_done:
            writes = args.process_index == 0
            with (
                reporting(folder, is_writer=writes),
                record_run(
                    folder, run_log, config.trainer.alert_command, is_writer=writes, is_resumed=not start.is_first
                ) as status,
            ):
                _train(objective, model_config, processor, args, start, verdicts, status, name)
    return folder


def _train(
    objective: Objective,
    model_config: PreTrainedConfig,
    processor: Processor,
    args: TrainingArguments,
    start: RunStart,
    verdicts: Verdicts,
    status: RunStatus,
    name: str,
) -> None:
    config, folder = objective.config, start.folder
    data = objective.load_data(model_config, processor, args)
    check_private_names()  # of libraries that the data have brought
    records = data.records["train"]

    def begin() -> None:
        """Check and record what the data are, as soon as they are counted."""
        check_videos(config, model_config, verdicts, data.records.values())
        check_same_data(data.records)
        start.begin(data.records)
        _log_data(data)

    when_counted(records, begin)
    if isinstance(records, CountedLater) and start.checkpoint is not None:
        records.wait()  # the data of a resumed run are compared with those of before

    seed_everything(args)  # no weight depends on what was drawn before
    model = load_weights(config, model_config, processor, compute_dtype(args), args.seed)
    model = objective.wrap_model(model, args)
    check_round_trip(model)
    set_reply_ends(model, processor)
    parts = prepare(model, config, args, processor, read_unused(verdicts))
    log.info("Run directory: %s\n\n%s\n", folder, table(parts))
    if args.process_index == 0:
        write_parts(folder, parts)

    collate = objective.make_collator(processor, data, args)
    prepared = PreparedRun(folder, args, processor, model, parts, data, collate, status)
    objective.before_training(prepared)
    if start.checkpoint is not None:
        prepared.args.eval_on_start = False  # that was at the first start
    trainer = make_trainer(objective, prepared)
    progress = RunProgress(trainer, start)
    trainer.changed_keys = start.changed_keys
    trainer.saved_with_checkpoint.append(progress)
    trainer.add_callback(progress)
    if isinstance(records, CountedLater):
        trainer.add_callback(FinishCounting(records, trainer))
    with counting(records):
        trainer.train(resume_from_checkpoint=start.checkpoint)
    objective.after_training(prepared, trainer)
    with trainer.stop_on_signal.saving(), status.during(SAVING):
        final = write_final(trainer, folder, start.record, progress.progress)
    objective.after_saving(final)
    commands = objective.next_commands(final, find_example_question(data.records, folder))
    log.info("Done.\n\n%s\n", describe_next_steps(commands, config, name, final))


def _log_data(data: RunData) -> None:
    if isinstance(train := data.records["train"], SampleDataset):
        log.info("Training data:\n\n%s\n", contribution_table(train.contributions))
        if not data.summary and (held_out := describe_held_out(train, data.records.get("eval"))):
            log.info("%s\n", held_out)
    if data.summary:
        log.info("Records:\n\n%s\n", data.summary)
