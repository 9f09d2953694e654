"""Finds the checkpoint that a run goes on from. Every rank calls these functions, and all agree."""

import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

COMPLETE_MARK = "complete"

CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def list_checkpoints(run_directory: Path) -> dict[int, Path]:
    """Return step -> folder of each checkpoint of a run by its name alone, the newest first."""
    named = [(CHECKPOINT_NAME.fullmatch(folder.name), folder) for folder in run_directory.glob("*") if folder.is_dir()]
    return dict(sorted(((int(match[1]), folder) for match, folder in named if match), reverse=True))


def find_whole_checkpoint(run_directory: Path) -> Path | None:
    """Return the newest whole checkpoint of a run; None where there is none."""
    folders = list_checkpoints(run_directory).values()
    return next((folder for folder in folders if (folder / COMPLETE_MARK).is_file()), None)


def require_whole_checkpoint(checkpoint: Path) -> Path:
    """Return a checkpoint that the user named.

    Raises:
        ValueError: it does not hold what was written.
    """
    if not (checkpoint / COMPLETE_MARK).is_file():
        raise ValueError(
            f"trainer.resume_from_checkpoint={checkpoint}: it was not written to its end. Name another one, or `auto` "
            "for the newest of trainer.output_dir that is whole"
        )
    return checkpoint


def set_aside_later(checkpoint: Path, run_directory: Path) -> None:
    """Rename the checkpoints of a run that are later than the one it goes on from: another history wrote them."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    for step, folder in list_checkpoints(run_directory).items():
        if match and step > int(match[1]):
            folder.rename(folder.with_name(f"{folder.name}.superseded"))
