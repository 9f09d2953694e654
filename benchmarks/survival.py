"""Cost of what lets a run survive, as a share of a step: its guards, and manifests of checkpoints, flushed to the disk.

    python -m benchmarks.survival [--gpu] [--tokens N] [--steps N] [--repeats N]

The run is the one that `vlm` starts, with SmolLM2-135M's and ViT-B/16's shapes; connector and language model train, so
that a checkpoint has 1.6 GB. It trains on each step's batch twice in a row, under its guards and without. Then it saves
in turns as it does, without hashes, manifest and flushing, and without the check of its weights either. What a save
costs is shared out to the steps between two checkpoints at the default `trainer.save_steps`. Guards and manifests are
measured apart, and together: a step under both over the same step with neither. About five minutes on two cores.
"""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.guards import guards_in_turns, timed_guards
from benchmarks.packed_steps import StepSize, prepare_run
from benchmarks.report import Row, below, paired, report
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import silence_libraries
from vlm.config.schema import RunConfig
from vlm.train.checkpoints.files import publish
from vlm.train.checkpoints.find import find_problems_together
from vlm.train.checkpoints.trainer import CheckpointTrainer
from vlm.train.checkpoints.writer import FolderWriter
from vlm.train.guards.trainer import GuardedTrainer

LIMIT = 0.02
"""The largest share of a step that everything here may cost."""
CPU = StepSize(steps=8)
"""The size for two cores: three batches that are measured, since those of the first two steps are not."""
GPU = StepSize(tokens=16384, steps=60, repeats=5, bf16=True)
"""The size for one large GPU."""


class PlainWriter(FolderWriter):
    """Writes as `torch.save` does, without hashes, manifest and flushing."""

    def save(self, state: object, path: Path, *, zipped: bool = True) -> None:
        """Write an object."""
        torch.save(state, path, _use_new_zipfile_serialization=zipped)

    def finish(self, step: int | None = None) -> None:
        """Give the folder its name."""
        publish(self.folder, self.target)


@dataclass(frozen=True)
class Costs:
    """Seconds of everything that is measured.

    Attributes:
        guarded: of each batch, a step under guards.
        unguarded: of the same batches, a step without.
        guards: of all calls of guards in a step under them.
        weight_checks: of the check of the weights before a save.
        whole: of each save as runs make it.
        plain: of saves without hashes, manifest and flushing.
        bare: of plain saves without the check of the weights.
        checks: of checking a checkpoint before it is resumed.
        num_bytes: bytes of a checkpoint.
    """

    guarded: list[float]
    unguarded: list[float]
    guards: float
    weight_checks: list[float]
    whole: list[float]
    plain: list[float]
    bare: list[float]
    checks: list[float]
    num_bytes: int

    def guards_row(self, interval: float) -> Row:
        """Return what guards cost: their calls in a step, and the check of the weights before a save."""
        step = median(self.unguarded)
        shares = [(self.guards + check / interval) / step for check in self.weight_checks]
        return below(f"guards, a save every {interval:.0f} steps", shares, "share of a step", "", LIMIT)

    def manifest_row(self, interval: float) -> Row:
        """Return what manifests and flushing cost, shared out to the steps between two checkpoints."""
        step = median(self.unguarded)
        shares = [(whole - plain) / interval / step for whole, plain in zip(self.whole, self.plain, strict=True)]
        return below(f"manifests and flushing, a save every {interval:.0f} steps", shares, "share of a step", "", LIMIT)

    def row_of_both(self, interval: float) -> Row:
        """Return a step under both, with its share of a save, over the same step with neither."""
        both = [step + median(self.whole) / interval for step in self.guarded]
        neither = [step + median(self.bare) / interval for step in self.unguarded]
        name = f"guards and manifests, a save every {interval:.0f} steps"
        return paired(name, both, neither, ("with both", "with neither"), "s a step", 1 + LIMIT, "lower")

    def shortest_step(self, interval: float) -> float:
        """Return the seconds of a step of which manifests cost `LIMIT`; of longer ones they cost less."""
        return median(map(float.__sub__, self.whole, self.plain)) / interval / LIMIT


def measure(size: StepSize, folder: Path) -> Costs:
    """Train on each batch with guards and without, and save in turns with a manifest and without."""
    train = prepare_run(size, folder)
    with timed_guards() as calls, guards_in_turns() as are_on:
        run = train("run")
    seconds = list(zip(are_on, run.seconds, strict=True))[2:]
    guarded, unguarded = ([step for is_on, step in seconds if is_on is wanted] for wanted in (True, False))
    saves = time_saves(run.trainer, size.repeats)
    num_bytes = sum(file.stat().st_size for file in _checkpoint_of(run.trainer).rglob("*"))
    return Costs(guarded, unguarded, sum(calls) / sum(are_on), num_bytes=num_bytes, **saves)


def time_saves(trainer: Any, repeats: int) -> dict[str, list[float]]:
    """Save a trainer's checkpoint in turns, in each way; the disk is done with the one before each time.

    Returns:
        The attributes of `Costs` that are of saves.
    """
    plain = patch.object(CheckpointTrainer, "_make_writer", _make_plain_writer)
    unchecked = patch.object(GuardedTrainer, "_check_finite_weights", lambda *_: None)
    actions: dict[str, Callable[[], object]] = {
        "bare": lambda: _save(trainer, plain, unchecked),
        "plain": lambda: _save(trainer, plain),
        "whole": lambda: _save(trainer),
        "checks": lambda: _check_whole(_checkpoint_of(trainer)),
        "weight_checks": lambda: trainer._check_finite_weights("the model"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            seconds[name].append(_time(action))
            print(f"  {name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def _save(trainer: Any, *changes: AbstractContextManager[Any]) -> None:
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        trainer._save_checkpoint(trainer.model, None)


def _time(action: Callable[[], object]) -> float:
    os.sync()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _check_whole(checkpoint: Path) -> None:
    assert find_problems_together(checkpoint) == []


def _checkpoint_of(trainer: Any) -> Path:
    return Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")


def _make_plain_writer(trainer: CheckpointTrainer, target: Path, *, in_background: bool = False) -> PlainWriter:
    return PlainWriter(target, is_leader=True, is_first_of_node=True, in_background=in_background)


def main() -> None:
    """Measure and report."""
    args = make_parser(__doc__, ("tokens", "steps", "repeats")).parse_args()
    size = make_size(args, CPU, GPU)
    silence_libraries()
    with tempfile.TemporaryDirectory() as name:
        costs = measure(size, Path(name))
    interval = float(RunConfig().trainer.save_steps)
    notes = {
        f"seconds of a step of which manifests are {LIMIT:.0%}": costs.shortest_step(interval),
        "seconds of a step": median(costs.unguarded),
        "seconds of guards in it": costs.guards,
        "GB of a checkpoint": costs.num_bytes / 1e9,
        "seconds of a save": median(costs.whole),
        "seconds of a save without hashes, manifest and flushing": median(costs.plain),
        "seconds of a save whose weights are not checked either": median(costs.bare),
        "seconds of a check of the weights": median(costs.weight_checks),
        "seconds of checking a checkpoint before it is resumed": median(costs.checks),
    }
    rows = [costs.guards_row(interval), costs.manifest_row(interval), costs.row_of_both(interval)]
    report("survival-gpu" if args.gpu else "survival", rows, notes)


if __name__ == "__main__":
    main()
