"""Finds the checkpoint that a run goes on from."""

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlm.config.schema import RunConfig

COMPLETE_MARK = "complete"


def newest_checkpoint(run_directory: Path) -> Path:
    """Return the newest complete checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    complete = [mark.parent for mark in run_directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_MARK}")]
    if not complete:
        raise ValueError(f"trainer.resume_from_checkpoint=true: no complete checkpoint in {run_directory}")
    return max(complete, key=lambda folder: int(folder.name.rsplit("-", 1)[1]))


def checkpoint_to_resume(config: RunConfig, folder: Path) -> str | None:
    """Return the checkpoint that `trainer.resume_from_checkpoint` stands for; None: the run starts anew."""
    requested = config.trainer.resume_from_checkpoint
    if requested is None or requested.lower() == "false":
        return None
    return str(newest_checkpoint(folder)) if requested.lower() == "true" else requested
