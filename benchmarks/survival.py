"""Cost of what lets a run survive, as a share of a step: manifests of checkpoints, flushed to the disk.

    python -m benchmarks.survival [--gpu] [--tokens N] [--steps N] [--repeats N]

The run is the one that `vlm` starts, with SmolLM2-135M's and ViT-B/16's shapes; connector and language model train, so
that a checkpoint has 1.1 GB. When its steps have been timed, it saves in turns as it does, and as it would without
hashes, manifest and flushing. The difference is shared out to the steps between two checkpoints at the default
`trainer.save_steps`. About three minutes on two cores.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import counting
from benchmarks.lengths import draw_records, write_records
from benchmarks.report import Row, below, report
from benchmarks.shapes import SHAPES, write_parts
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import Steps, run_ours, silence_libraries
from vlm.config.schema import RunConfig
from vlm.train.checkpoints.files import publish
from vlm.train.checkpoints.find import find_problems_together
from vlm.train.checkpoints.trainer import CheckpointTrainer
from vlm.train.checkpoints.writer import FolderWriter

LIMIT = 0.02
"""The largest share of a step that everything here may cost."""


@dataclass(frozen=True)
class Size:
    """The size of the measurement.

    Attributes:
        shape: the model's shape, a name of `SHAPES`.
        tokens: `trainer.max_tokens_per_batch`.
        steps: number of steps of one pack each; the first is not measured.
        repeats: how often each way of saving is measured.
        bf16: whether matrix products run in bfloat16.
    """

    shape: str = "smol"
    tokens: int = 2048
    steps: int = 4
    repeats: int = 3
    bf16: bool = False


GPU = Size(tokens=16384, steps=30, repeats=5, bf16=True)
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
class Saves:
    """Seconds of saving a checkpoint as runs do and without what makes it whole, and of checking it; its bytes."""

    whole: list[float]
    plain: list[float]
    checks: list[float]
    num_bytes: int


def time_saves(trainer: Any, repeats: int) -> Saves:
    """Save a trainer's checkpoint in turns, in both ways; the disk is done with the one before each time."""
    checkpoint = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
    whole: list[float] = []
    plain: list[float] = []
    checks: list[float] = []
    for _ in range(repeats):
        with patch.object(CheckpointTrainer, "_make_writer", _make_plain_writer):
            plain.append(_time_save(trainer))
        whole.append(_time_save(trainer))
        start = time.perf_counter()
        assert find_problems_together(checkpoint) == []
        checks.append(time.perf_counter() - start)
        print(f"  saved in {whole[-1]:.2f} s, plainly in {plain[-1]:.2f} s, checked in {checks[-1]:.2f} s", flush=True)
    return Saves(whole, plain, checks, sum(file.stat().st_size for file in checkpoint.rglob("*")))


def _time_save(trainer: Any) -> float:
    os.sync()
    start = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    return time.perf_counter() - start


def _make_plain_writer(trainer: CheckpointTrainer, target: Path) -> PlainWriter:
    return PlainWriter(target, is_leader=True, is_first_of_node=True)


def measure(size: Size, folder: Path) -> tuple[Steps, Saves]:
    """Return the steps of a run, and the times of its checkpoints."""
    shape = SHAPES[size.shape]
    write_parts(folder / "parts", shape)
    records = counting.select_records(draw_records(size.steps * size.tokens // 50), shape, size.tokens, size.steps)
    path = write_records(folder / "data", records, shape.side)
    words = [f"trainer.max_tokens_per_batch={size.tokens}", f"trainer.bf16={str(size.bf16).lower()}"]
    run = run_ours(folder / "parts", path, folder / "run", *words)
    return run, time_saves(run.trainer, size.repeats)


def manifest_row(steps: Steps, saves: Saves, interval: float) -> Row:
    """Return what manifests and flushing cost, shared out to the steps between two checkpoints."""
    step = median(steps.seconds[1:])
    shares = [(whole - plain) / interval / step for whole, plain in zip(saves.whole, saves.plain, strict=True)]
    return below(f"manifests and flushing, a save every {interval:.0f} steps", shares, "share of a step", "", LIMIT)


def shortest_step(saves: Saves, interval: float) -> float:
    """Return the seconds of a step of which they cost `LIMIT`; of longer ones they cost less."""
    return median(whole - plain for whole, plain in zip(saves.whole, saves.plain, strict=True)) / interval / LIMIT


def main() -> None:
    """Measure and report."""
    args = make_parser(__doc__, ("tokens", "steps", "repeats")).parse_args()
    size = make_size(args, Size(), GPU)
    silence_libraries()
    with tempfile.TemporaryDirectory() as name:
        steps, saves = measure(size, Path(name))
    interval = float(RunConfig().trainer.save_steps)
    row = manifest_row(steps, saves, interval)
    notes = {
        f"seconds of a step of which they are {LIMIT:.0%}": shortest_step(saves, interval),
        "seconds of a step": median(steps.seconds[1:]),
        "GB of a checkpoint": saves.num_bytes / 1e9,
        "seconds of a save": median(saves.whole),
        "seconds of a save without hashes, manifest and flushing": median(saves.plain),
        "seconds of checking a checkpoint before it is resumed": median(saves.checks),
    }
    report("survival-gpu" if args.gpu else "survival", [row], notes)


if __name__ == "__main__":
    main()
