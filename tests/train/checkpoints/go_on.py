"""What tests that resume do to a run."""

import shutil
from pathlib import Path


def forget_after(run: Path, step: int) -> None:
    """Remove later checkpoints and the finished model, as if the run had ended between."""
    shutil.rmtree(run / "final", ignore_errors=True)
    for folder in run.glob("checkpoint-*"):
        if int(folder.name.rpartition("-")[2]) > step:
            shutil.rmtree(folder)
