"""Runs of a few steps on packed rows of the mixture: what benchmarks measure the cost of single things by."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import counting
from benchmarks.lengths import draw_records, write_records
from benchmarks.shapes import SHAPES, write_parts
from benchmarks.variants import Steps, run_ours


@dataclass(frozen=True)
class StepSize:
    """The size of the measurement.

    Attributes:
        shape: the model's shape, a name of `SHAPES`.
        tokens: `trainer.max_tokens_per_batch`.
        steps: number of steps of one pack each; the first is not measured.
        repeats: how often what is compared takes turns.
        bf16: whether matrix products run in bfloat16.
    """

    shape: str = "smol"
    tokens: int = 2048
    steps: int = 4
    repeats: int = 3
    bf16: bool = False


def prepare_run(size: StepSize, folder: Path) -> Callable[..., Steps]:
    """Write the parts and the records of a run; return a function that trains on them.

    `train(name, keeps=False)` trains in the folder `name` below `folder`; with `keeps`, its batches are kept.
    """
    shape = SHAPES[size.shape]
    write_parts(folder / "parts", shape)
    records = counting.select_records(draw_records(size.steps * size.tokens // 50), shape, size.tokens, size.steps)
    path = write_records(folder / "data", records, shape.side)
    words = [f"trainer.max_tokens_per_batch={size.tokens}", f"trainer.bf16={str(size.bf16).lower()}"]

    def train(name: str, *, keeps: bool = False) -> Steps:
        return run_ours(folder / "parts", path, folder / name, *words, keeps=keeps)

    return train
