"""The finished model of a run: written aside with the run's record, then renamed, so that `final` is always whole."""

import shutil
from pathlib import Path
from typing import Protocol

from vlm.train.distributed import barrier, on_rank0
from vlm.train.resume.record import Progress, RunRecord, write_record
from vlm.train.resume.start import FINAL


class SavingTrainer(Protocol):
    """What is asked of the run's `VLMTrainer`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with its processor; every rank calls this."""
        ...


def write_final(trainer: SavingTrainer, folder: Path, record: RunRecord, progress: Progress) -> Path:
    """Write the model of a run that is done into `final` of its directory, in place of an earlier one; every rank."""
    partial, final, earlier = (folder / name for name in (f"{FINAL}.writing", FINAL, f"{FINAL}.earlier"))
    on_rank0(lambda: [shutil.rmtree(path) for path in (partial, earlier) if path.exists()])
    trainer.save_model(str(partial))
    barrier()

    def rename() -> None:
        write_record(partial, record, progress)
        if final.exists():
            final.rename(earlier)
        partial.rename(final)
        shutil.rmtree(earlier, ignore_errors=True)

    on_rank0(rename)
    return final
