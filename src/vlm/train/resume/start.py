"""How a run starts: as a new run, from one of its checkpoints, or not at all, because it is done.

`trainer.resume_from_checkpoint=auto` resumes from the newest whole checkpoint of the run directory and begins if
there is none, so that one command starts a run, continues it after whatever ended it, and leaves it alone once it
is done. Rank 0 decides.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm.config.schema import RunConfig, TrainerOptions
from vlm.train.checkpoints.find import (
    checkpoint_step,
    find_whole_checkpoint,
    require_own_checkpoint,
    require_whole_checkpoint,
)
from vlm.train.checkpoints.world import UNSHARDED, World, find_world_problem, read_world
from vlm.train.distributed import on_rank0
from vlm.train.resume.changes import (
    Change,
    compare_data,
    compare_settings,
    list_changes,
    refuse_changes,
    refuse_changes_of_done,
    take_another_world,
)
from vlm.train.resume.lock import RunLock
from vlm.train.resume.record import Progress, RunRecord, read_record

log = logging.getLogger(__name__)

FINAL = "final"
"""The folder of a run directory that holds the finished model."""

AUTO_WORDS, ANEW_WORDS = ("auto", "true"), ("never", "false")
"""Values of `trainer.resume_from_checkpoint` besides the folder of a checkpoint; the second of each are older names."""


@dataclass(frozen=True)
class Start:
    """How a run starts.

    Attributes:
        checkpoint: the checkpoint to resume from; None if the run starts anew, or is done.
        is_done: whether nothing is left to do.
        before: the record and the progress of the checkpoint's run.
        changes: the accepted changes of settings.
    """

    checkpoint: Path | None = None
    is_done: bool = False
    before: RunRecord | None = None
    progress: Progress | None = None
    changes: Sequence[Change] = field(default_factory=list)


def set_aside(folder: Path) -> None:
    """Rename a run directory that contains a run, if it exists and no run is training in it.

    Raises:
        ValueError: another run trains in it, or it cannot be renamed.
    """
    if not any(folder.glob("checkpoint-*")) and not any((folder / name).exists() for name in (FINAL, "metrics.jsonl")):
        return
    key = f"trainer.resume_from_checkpoint=never: trainer.output_dir={folder}"
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{key} contains a run and the working directory, so it cannot be renamed; choose another directory"
        )
    lock = RunLock(folder)
    lock.acquire()
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
    target = folder.with_name(f"{folder.name}.{number}")
    try:
        lock.move(target)
    except OSError as error:
        lock.release()
        raise ValueError(f"{key} contains a run and cannot be renamed ({error.strerror or error})") from error
    log.info("trainer.resume_from_checkpoint=never: moved the earlier run from %s to %s", folder, target)


def decide_start(config: RunConfig, folder: Path, now: RunRecord, world: World) -> Start:
    """Return how the run of a directory starts; every rank calls this.

    Args:
        config: the run's configuration.
        folder: its directory, which this run has locked.
        now: the record of the run, without its data.
        world: its ranks and sharding.

    Raises:
        ValueError: the directory contains another run, or the requested checkpoint is damaged.
    """
    requested = config.trainer.resume_from_checkpoint
    if requested.lower() in ANEW_WORDS:
        return Start()
    is_path = requested.lower() not in AUTO_WORDS
    if is_path and Path(requested).resolve().parent == folder.resolve():
        checkpoint = require_whole_checkpoint(Path(requested))
        return on_rank0(lambda: _resume(config, folder, checkpoint, now, world))
    newest = find_whole_checkpoint(folder)
    if on_rank0(lambda: (folder / FINAL).is_dir()):
        return on_rank0(lambda: _start_beside_final(config, folder, newest, now, world))
    if newest is None and is_path:
        newest = require_whole_checkpoint(Path(requested))
    return Start() if newest is None else on_rank0(lambda: _resume(config, folder, newest, now, world))


def _resume(config: RunConfig, folder: Path, checkpoint: Path, now: RunRecord, world: World) -> Start:
    """Return the start from a checkpoint, if its run is the same or the changes are accepted."""
    saved = read_world(checkpoint)
    if world.sharding != UNSHARDED or (saved is not None and saved.layout != world.layout):
        require_own_checkpoint(checkpoint, folder)
    before, progress = read_record(checkpoint)
    accepts = config.trainer.resume_changes == "accept"
    if problem := find_world_problem(checkpoint, world, accepts_other_steps=accepts):
        raise ValueError(problem)
    changes = compare_settings(before, now, config)
    if saved is not None and (saved.ranks, saved.sharding) != (world.ranks, world.sharding):
        changes = take_another_world(changes)
    refuse_changes(changes, checkpoint, accepts=accepts)
    if progress is not None and (problem := _exceeds(config.trainer, before, progress)):
        raise ValueError(f"{problem}, and {checkpoint} is beyond it. Raise it, or choose another trainer.output_dir")
    return Start(checkpoint, before=before, progress=progress, changes=changes)


def _start_beside_final(config: RunConfig, folder: Path, newest: Path | None, now: RunRecord, world: World) -> Start:
    """Return the start of a run with a finished model: it is done, unless more steps or epochs are requested."""
    before, progress = read_record(folder / FINAL)
    changes = compare_settings(before, now, config)
    if not _asks_for_more(config.trainer, before, progress):
        if before.world_size != now.world_size:
            changes = take_another_world(changes)
        refuse_changes_of_done(changes, folder / FINAL)
        return Start(is_done=True, before=before, progress=progress)
    newest_step = None if newest is None else checkpoint_step(newest)
    if newest is None or newest_step is None or (progress is not None and newest_step < progress.step):
        raise ValueError(
            f"trainer.output_dir={folder}: its run is done, and there is no checkpoint of its last step to resume "
            f"from. Choose another directory, and start from its model with trainer.from_pretrained={folder / FINAL}"
        )
    return _resume(config, folder, newest, now, world)


def _exceeds(trainer: TrainerOptions, before: RunRecord, progress: Progress) -> str | None:
    """Return the key that requests fewer steps or epochs than were trained, or None."""
    if trainer.max_steps > 0:
        return f"trainer.max_steps={trainer.max_steps}" if progress.step > trainer.max_steps else None
    was = before.config.get("trainer", {}).get("num_train_epochs", trainer.num_train_epochs)
    fewer = trainer.num_train_epochs < min(was, progress.epoch)
    return f"trainer.num_train_epochs={trainer.num_train_epochs}" if fewer else None


def _asks_for_more(trainer: TrainerOptions, before: RunRecord, progress: Progress | None) -> bool:
    """Return whether a finished run is to train longer."""
    was = before.config.get("trainer", {})
    if trainer.max_steps > 0:
        return trainer.max_steps > (progress.step if progress is not None else was.get("max_steps", 0))
    if was.get("max_steps", -1) > 0:  # ended by its number of steps; how many its epochs have is not known yet
        return progress is None or trainer.num_train_epochs > progress.epoch
    return trainer.num_train_epochs > was.get("num_train_epochs", trainer.num_train_epochs)


def check_data(config: RunConfig, start: Start, now: RunRecord) -> list[Change]:
    """Return the accepted differences between the data and those of the checkpoint; every rank calls this.

    Raises:
        ValueError: the data differ, and `trainer.resume_changes` does not accept it.
    """
    if start.checkpoint is None or start.before is None:
        return []
    changes = compare_data(start.before, now, streams=config.dataset.streaming)
    refuse_changes(changes, start.checkpoint, accepts=config.trainer.resume_changes == "accept")
    return changes


def describe_start(start: Start, folder: Path) -> str:
    """Return in words how a run starts, for the log."""
    if start.is_done:
        steps = f" after {start.progress.step:,} steps" if start.progress is not None else ""
        return (
            f"The run in {folder} is done{steps}. Its model is {folder / FINAL}. To train "
            "longer, raise trainer.num_train_epochs or trainer.max_steps; to start over, set "
            "trainer.resume_from_checkpoint=never, which moves it aside"
        )
    if start.checkpoint is None:
        return f"Starting a new run in {folder}"
    changed = f". Changed since:\n{list_changes(start.changes)}" if start.changes else ""
    return f"Resuming the run in {folder} from {start.checkpoint}{changed}"
