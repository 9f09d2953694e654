"""The trainer of a run, with everything that it writes on the way."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from vlm.config.secrets import mask_settings
from vlm.runs.files import flatten
from vlm.train.monitor.callbacks import MetricsFile, SetSamplerEpoch
from vlm.train.monitor.evaluation_records import EvaluationRecords
from vlm.train.monitor.profiler import ProfilerCallback
from vlm.train.monitor.progress_line import ProgressLine
from vlm.train.monitor.recording import record_stuck
from vlm.train.monitor.speed import make_speed_meter
from vlm.train.monitor.trackers import add_trackers
from vlm.train.objectives.base import Objective, PreparedRun
from vlm.train.resume.progress import AppendedFiles
from vlm.train.run_directory import SkippedRecords
from vlm.train.stop_on_signal import StopOnSignal
from vlm.train.trainer import VLMTrainer


def make_trainer(objective: Objective, run: PreparedRun) -> VLMTrainer:
    """Return what trains a run's model; `run.args.output_dir` is the run directory, or below it a fold's."""
    config, args, output_dir = objective.config, run.args, Path(run.args.output_dir or run.folder)
    is_whole_run, is_writer = output_dir == run.folder, args.process_index == 0
    shows_batch = is_writer and is_whole_run and not (run.folder / "first_batch.html").exists()
    skipped = SkippedRecords(run, config.dataset, args.world_size)
    trainer = VLMTrainer(
        objective=objective,
        run=run,
        on_first_batch=(lambda batch: objective.write_first_batch(run, batch)) if shows_batch else None,
        on_skipped=skipped,
        callbacks=[MetricsFile(output_dir, objective.loss_label)],
        progress=ProgressLine(run.status, is_writer=is_writer),
        stop_on_signal=StopOnSignal(can_save=is_whole_run),
        meter=make_speed_meter(run, output_dir, config.trainer.peak_tflops, objective.flops_note),
    )
    if trainer.watchdog is not None and is_writer:
        trainer.watchdog.on_end = partial(record_stuck, run.status, config.trainer.alert_command)
    trainer.saved_with_checkpoint += [skipped, AppendedFiles(output_dir, is_writer=is_writer)]
    trainer.add_callback(SetSamplerEpoch(lambda: trainer.sampler))
    evaluated, best = run.data.records.get("eval"), trainer.best_model
    trainer.add_callback(
        EvaluationRecords(output_dir, objective, evaluated, lambda: None if best is None else best.step)
    )
    if config.trainer.profile and is_writer:  # the profile ends before the callbacks of the objective
        trainer.add_callback(ProfilerCallback(run.folder / "profile", run.model))
    for callback in objective.callbacks(run, trainer):
        trainer.add_callback(callback)
    add_trackers(trainer, flatten(mask_settings(asdict(config))))
    return trainer
