"""The trainer of a run, with everything that it writes on the way."""

from pathlib import Path

from vlm.assembly.adapter_base import make_base
from vlm.train.monitor.callbacks import MetricsFile, SetSamplerEpoch, StopAtNaN
from vlm.train.monitor.profiler import ProfilerCallback
from vlm.train.monitor.speed import SpeedMeter
from vlm.train.monitor.speed_callback import make_speed_meter
from vlm.train.objectives.base import Objective, PreparedRun
from vlm.train.run_directory import SkippedRecords
from vlm.train.signals import SigtermCheckpoint
from vlm.train.trainer import VLMTrainer


def make_trainer(objective: Objective, run: PreparedRun) -> VLMTrainer:
    """Return what trains a run's model; `run.args.output_dir` is the run directory, or below it a fold's."""
    config, args, output_dir = objective.config, run.args, Path(run.args.output_dir or run.folder)
    is_whole_run, is_writer = output_dir == run.folder, args.process_index == 0
    trainer = VLMTrainer(
        objective=objective,
        model=run.model,
        processor=run.processor,
        args=args,
        parts=run.parts,
        base=make_base(config),
        on_first_batch=(lambda batch: objective.write_first_batch(run, batch)) if is_writer and is_whole_run else None,
        on_skipped=SkippedRecords(run.folder, run.data.records["train"], config.dataset, args.world_size),
        data_collator=run.collate,
        train_dataset=run.data.train,
        eval_dataset=run.data.evaluation,
        callbacks=[MetricsFile(output_dir), StopAtNaN(), SigtermCheckpoint(can_save=is_whole_run)],
        meter=_make_meter(objective, run, output_dir),
    )
    trainer.add_callback(SetSamplerEpoch(lambda: trainer.sampler))
    if config.trainer.profile and is_writer:  # the profile ends before the callbacks of the objective
        trainer.add_callback(ProfilerCallback(run.folder / "profile", run.model))
    for callback in objective.callbacks(run, trainer):
        trainer.add_callback(callback)
    return trainer


def _make_meter(objective: Objective, run: PreparedRun, folder: Path) -> SpeedMeter:
    """Return what measures the speed of a run; the first rank's knows its operations, if they can be counted."""
    if objective.flops_note is None:
        peak = objective.config.trainer.peak_tflops
        return make_speed_meter(run.model, run.processor, run.args, peak, folder)
    is_writer = run.args.process_index == 0
    return SpeedMeter(run.args.device, note=objective.flops_note, folder=folder if is_writer else None)
