"""The finished model of a run, which is saved with the run's record."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from transformers import TrainingArguments

from vlm.train.checkpoints.find import SUPERSEDED, set_aside
from vlm.train.distributed import on_rank0
from vlm.train.resume.record import Progress, RunRecord, read_record, write_record
from vlm.train.resume.start import FINAL


class SavingTrainer(Protocol):
    """The attributes of the run's `VLMTrainer` that are used here."""

    args: TrainingArguments

    def save_whole_model(self, folder: Path, write_more: Callable[[Path], object] | None = None) -> None:
        """Save the model with its processor; every rank calls this."""
        ...


def write_final(trainer: SavingTrainer, folder: Path, record: RunRecord, progress: Progress) -> Path:
    """Write the model of a finished run into `final`, replacing an earlier one; every rank calls this."""

    def write_more(unfinished: Path) -> None:
        """Write the record of the run next to its weights."""
        if trainer.args.should_save:
            write_record(unfinished, record, progress)

    trainer.save_whole_model(folder / FINAL, write_more)
    return folder / FINAL


def set_aside_later_final(folder: Path, step: int) -> None:
    """Rename the finished model of a run that resumes from an earlier step; every rank calls this.

    Otherwise the run would count as done.
    """

    def is_later() -> bool:
        """Return whether there is a finished model of a later step."""
        progress = read_record(folder / FINAL)[1] if (folder / FINAL).is_dir() else None
        return progress is not None and progress.step > step

    if on_rank0(is_later):
        set_aside(folder / FINAL, SUPERSEDED, f"is of a later step than {step}, from which the run resumes")
