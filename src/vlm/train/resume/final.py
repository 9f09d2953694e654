"""The finished model of a run, which has the run's record with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from transformers import TrainingArguments

from vlm.train.resume.record import Progress, RunRecord, write_record
from vlm.train.resume.start import FINAL


class SavingTrainer(Protocol):
    """What is asked of the run's `VLMTrainer`."""

    args: TrainingArguments

    def save_whole_model(self, folder: Path, write_more: Callable[[Path], object] | None = None) -> None:
        """Save the model with its processor; every rank calls this."""
        ...


def write_final(trainer: SavingTrainer, folder: Path, record: RunRecord, progress: Progress) -> Path:
    """Write the model of a run that is done into `final` of its directory, in place of an earlier one; every rank."""

    def write_more(unfinished: Path) -> None:
        if trainer.args.should_save:
            write_record(unfinished, record, progress)

    trainer.save_whole_model(folder / FINAL, write_more)
    return folder / FINAL
