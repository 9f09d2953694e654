"""Finds the checkpoint that a run goes on from."""

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

COMPLETE_MARK = "complete"


def find_whole_checkpoint(run_directory: Path) -> Path | None:
    """Return the newest whole checkpoint of a run; None where there is none. Every rank calls this, and all agree."""
    marks = run_directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_MARK}")
    whole = [mark.parent for mark in marks if checkpoint_step(mark.parent) is not None]
    return max(whole, key=lambda folder: checkpoint_step(folder) or 0, default=None)


def verify_checkpoint(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint; nothing where it is whole."""
    return [] if (folder / COMPLETE_MARK).is_file() else [f"{folder}: it was not written to its end"]


def checkpoint_step(folder: Path) -> int | None:
    """Return the step of a checkpoint's folder, `checkpoint-STEP`; None for a folder of another name."""
    prefix, _, number = folder.name.rpartition("-")
    return int(number) if prefix == PREFIX_CHECKPOINT_DIR and number.isdecimal() else None
