"""Finds the checkpoint that a run resumes from: the newest one that is undamaged. Called on every rank."""

import logging
import re
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlm.checks.disk import format_bytes
from vlm.train.checkpoints.files import remove_folder, restore_replaced
from vlm.train.checkpoints.groups import group_by_value, rank_and_world_size
from vlm.train.checkpoints.manifest import (
    MANIFEST,
    FileRecord,
    find_file_problems,
    is_unverified,
    looks_whole,
    read_manifest,
)
from vlm.train.distributed import all_gather_objects, barrier

log = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(0|[1-9][0-9]*)")

DAMAGED, SUPERSEDED = "damaged", "superseded"
"""Endings for the names of damaged checkpoints, and of those that are later than the one that a run resumes from."""

MAX_PROBLEMS = 3
"""Number of damaged files that a message names."""


def list_checkpoints(run_directory: Path) -> dict[int, Path]:
    """Return step -> folder for each checkpoint of a run, judging by names alone, the newest first."""
    named = [(checkpoint_step(folder), folder) for folder in run_directory.glob("*") if folder.is_dir()]
    return dict(sorted(((step, folder) for step, folder in named if step is not None), reverse=True))


def checkpoint_step(folder: Path) -> int | None:
    """Return the step of a checkpoint by its name, `checkpoint-STEP`; None for a folder of another name."""
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def find_whole_checkpoint(run_directory: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a run. Every rank calls this and gets the same answer.

    Each rank hashes a share of the files. A damaged checkpoint is renamed (`checkpoint-8.damaged`), with a log message.
    A checkpoint of an earlier version, without a manifest, is accepted unchecked.
    """
    restore_replaced(run_directory)
    barrier()
    for step in sorted(set(chain(*all_gather_objects(list(list_checkpoints(run_directory))))), reverse=True):
        checkpoint = run_directory / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        problems = find_problems_together(checkpoint)
        if not problems:
            return checkpoint
        set_aside(checkpoint, DAMAGED, f"is damaged: {'; '.join(problems)}")
    return None


def require_whole_checkpoint(checkpoint: Path) -> Path:
    """Return a checkpoint that the user named; every rank calls this.

    Raises:
        ValueError: it is damaged.
    """
    if problems := find_problems_together(checkpoint):
        raise ValueError(
            f"trainer.resume_from_checkpoint={checkpoint}: {'; '.join(problems)}. Name another checkpoint, or `auto` "
            "for the newest complete one in trainer.output_dir"
        )
    return checkpoint


def require_own_checkpoint(checkpoint: Path, run_directory: Path) -> None:
    """Refuse foreign pickles, which can run code when they are read; files of DeepSpeed and FSDP2 are pickles.

    Raises:
        ValueError: the checkpoint, or one of its files, is not in the run directory.
    """
    real = checkpoint.resolve()
    if real.parent != run_directory.resolve() or any(_leads_out(real)):
        raise ValueError(
            f"trainer.resume_from_checkpoint={checkpoint}: files of sharded runs (trainer.deepspeed, trainer.sharding) "
            "can run code when they are read, so such runs only read checkpoints in their own directory, "
            f"trainer.output_dir={run_directory}. If you trust this checkpoint, copy its folder there"
        )


def _leads_out(checkpoint: Path) -> Iterator[Path]:
    """Yield what leads out of a checkpoint: links, and `latest`, which names the folder of DeepSpeed's files."""
    for file in checkpoint.rglob("*"):
        if file.is_symlink() and not file.resolve().is_relative_to(checkpoint):
            yield file
    latest = checkpoint / "latest"
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if name in ("", "..") or Path(name).name != name:
            yield latest


def find_problems_together(checkpoint: Path) -> list[str]:
    """Return what is wrong with a checkpoint, the same on every rank; each rank reads a share of the files."""
    problems: list[str] = []
    files: dict[str, FileRecord] = {}
    identity, legacy = None, is_unverified(checkpoint)
    try:
        if not legacy:
            manifest = read_manifest(checkpoint)
            stat = (checkpoint / MANIFEST).stat()
            files, identity = manifest.files, (stat.st_ino, stat.st_mtime_ns)
            log.info("Checking %s (%s)", checkpoint, format_bytes(manifest.num_bytes))
            if checkpoint_step(checkpoint) not in (None, manifest.step):
                problems = [f"{MANIFEST} is of step {manifest.step}"]
    except (ValueError, OSError) as error:
        problems = [str(error)]
    group = group_by_value(identity)  # ranks that see the same file share the disk that it is on
    share = group.take_share(sorted(files, key=lambda name: (-files[name].size, name)))  # of about equal size
    problems += find_file_problems(checkpoint, {name: files[name] for name in share})
    gathered = list(dict.fromkeys(chain(*all_gather_objects(problems))))
    if legacy and not gathered and rank_and_world_size()[0] == 0:
        log.warning(
            "%s was written by an earlier version and has no manifest, so its files were not checked", checkpoint
        )
    more = [f"and {len(gathered) - MAX_PROBLEMS} more files"] if len(gathered) > MAX_PROBLEMS else []
    return gathered[:MAX_PROBLEMS] + more


def set_aside(checkpoint: Path, ending: str, reason: str) -> None:
    """Rename a checkpoint so that it no longer counts as one; every rank calls this."""
    names = (f"{checkpoint.name}.{ending}{'' if number == 1 else f'-{number}'}" for number in count(1))
    target = next(folder for folder in map(checkpoint.with_name, names) if not folder.exists())
    barrier()  # all ranks have looked before one of them renames
    failure = None
    try:
        checkpoint.rename(target)
    except FileNotFoundError:
        pass  # another rank was faster
    except OSError as error:
        failure = error
    if rank_and_world_size()[0] == 0:
        outcome = f"it was renamed to {target.name}" if failure is None else f"it could not be renamed ({failure})"
        log.warning("%s %s; %s", checkpoint, reason, outcome)
    barrier()


def set_aside_later(checkpoint: Path, run_directory: Path) -> None:
    """Rename the checkpoints that are later than the one that a run resumes from: they belong to another history."""
    if checkpoint.resolve().parent != run_directory.resolve():
        return
    first = checkpoint_step(checkpoint)
    for step in sorted(set(chain(*all_gather_objects(list(list_checkpoints(run_directory)))))):
        if first is not None and step > first:
            folder = run_directory / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            set_aside(folder, SUPERSEDED, f"is later than {checkpoint.name}, from which the run resumes")


def remove_old_checkpoints(run_directory: Path, limit: int | None, best_step: int | None = None) -> None:
    """Remove all complete checkpoints except the newest `limit` and the best one; damaged ones do not count."""
    if limit is None or limit <= 0:
        return
    whole = _whole_checkpoints(run_directory, best_step)
    for checkpoint in list(whole)[limit:]:
        try:
            remove_folder(checkpoint)
        except OSError as error:  # the new checkpoint is complete in any case
            log.warning("%s could not be removed (%s)", checkpoint, error)


def _whole_checkpoints(run_directory: Path, best_step: int | None) -> Iterator[Path]:
    for step, folder in list_checkpoints(run_directory).items():
        if step != best_step and looks_whole(folder):
            yield folder
