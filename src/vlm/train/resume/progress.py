"""The progress that a run needs to continue exactly, besides weights, optimiser, schedule and random numbers."""

import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.train.distributed import on_rank0
from vlm.train.guards.logged_loss import LoggedLoss
from vlm.train.resume.directory import RunStart
from vlm.train.resume.final import set_aside_later_final
from vlm.train.resume.record import Progress, read_record, write_record
from vlm.train.run_directory import write_json

LOSS_SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")
"""Attributes that `Trainer` keeps between two logs: the sum of losses since the last log, that of all logs, and two
steps."""

APPENDED_FILES = ("metrics.jsonl", "samples.md", "guard.jsonl")
"""Files of a run directory to which a run appends."""


class ResumableTrainer(Protocol):
    """The attributes of the run's `VLMTrainer` that are used here, in addition to `LOSS_SUMS`."""

    args: TrainingArguments
    state: TrainerState
    changed_keys: frozenset[str]
    logged_loss: LoggedLoss

    def end_epoch(self) -> None:
        """Evaluate, log and save as after the last step of an epoch."""
        ...


class RunProgress(TrainerCallback):
    """Saves the run's record and its sums of losses with each checkpoint, and restores them.

    See `SavedWithCheckpoint`. It must be the last callback except those that measure time, because it ends an epoch
    whose last step was saved before its evaluation.
    """

    def __init__(self, trainer: ResumableTrainer, start: RunStart):
        self.trainer, self.start = trainer, start
        self.epoch_ended = True
        self.saved: dict[str, Any] = {}

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        state = self.trainer.state
        return Progress(state.global_step, state.max_steps, float(state.epoch or 0), self.epoch_ended)

    def save_to(self, checkpoint: Path) -> None:
        """Write the record on rank 0, and the sums of each rank."""
        args = self.trainer.args
        if args.process_index == 0:
            write_record(checkpoint, self.start.record, self.progress)
        sums = {name: getattr(self.trainer, name) for name in LOSS_SUMS}
        sums = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in sums.items()}
        sums |= {"ranks": args.world_size, "steps": self.trainer.logged_loss.counts}
        write_json(checkpoint / f"loss_sums-{args.process_index}.json", sums)

    def load_from(self, checkpoint: Path) -> None:
        """Read the sums. `on_train_begin` applies them, since `Trainer` sets them to 0 after this call."""
        args = self.trainer.args
        file = checkpoint / f"loss_sums-{args.process_index}.json"
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.saved = saved if saved.get("ranks") == args.world_size else {}  # of another number of ranks, none fits
        _, progress = on_rank0(lambda: read_record(checkpoint))  # the disk of another machine may not have it
        self.epoch_ended = progress is None or progress.epoch_ended
        run_directory = Path(str(args.output_dir))
        if checkpoint.resolve().parent == run_directory.resolve():
            set_aside_later_final(run_directory, self.trainer.state.global_step)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Restore the sums, apply this start's intervals, and end an epoch that was saved before it ended."""
        state.compute_steps(args, state.max_steps)  # a checkpoint brings its own `logging_steps`, `save_steps` …
        for name in LOSS_SUMS if self.saved else ():
            value = self.saved[name]
            setattr(self.trainer, name, torch.tensor(value, device=args.device) if name == "_tr_loss" else value)
        self.trainer.logged_loss.counts = self.saved.get("steps", {})
        loader = kwargs.get("train_dataloader")
        per_epoch = _steps_per_epoch(loader, args) if self.trainer.changed_keys else None
        if per_epoch is not None and state.global_step // per_epoch != int(state.epoch):
            state.epoch = state.global_step / per_epoch  # an epoch has another number of steps now
        is_at_end = state.global_step > 0 and (state.global_step >= state.max_steps or float(state.epoch).is_integer())
        if is_at_end and not self.epoch_ended:
            self.trainer.end_epoch()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Note that an epoch continues."""
        self.epoch_ended = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Note that the end of the epoch, such as its evaluation, comes before the next checkpoint."""
        self.epoch_ended = True


def _steps_per_epoch(loader: object, args: TrainingArguments) -> int | None:
    """Return the number of steps of an epoch; None for a stream, which has no epochs."""
    try:
        return -(-len(loader) // args.gradient_accumulation_steps) if isinstance(loader, DataLoader) else None
    except TypeError:
        return None


class AppendedFiles:
    """Removes what was appended to files of the run directory after a checkpoint; see `SavedWithCheckpoint`."""

    def __init__(self, folder: Path, *, is_writer: bool):
        self.folder, self.is_writer = folder, is_writer

    def save_to(self, checkpoint: Path) -> None:
        """Write the sizes of the files."""
        if self.is_writer:
            files = [self.folder / name for name in APPENDED_FILES]
            sizes = {file.name: file.stat().st_size if file.exists() else 0 for file in files}
            write_json(checkpoint / "file_sizes.json", sizes)

    def load_from(self, checkpoint: Path) -> None:
        """Truncate the files to these sizes, if the checkpoint belongs to this run directory."""
        file = checkpoint / "file_sizes.json"
        if not self.is_writer or checkpoint.parent.resolve() != self.folder.resolve() or not file.is_file():
            return
        for name, size in json.loads(file.read_text(encoding="utf-8")).items():
            path = self.folder / name
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)
