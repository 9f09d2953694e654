"""Cost of the guards of a run as a share of a step: judging the update, naming samples, heartbeats.

    python -m benchmarks.guards [--gpu] [--tokens N] [--steps N]

The run is the one that `vlm` starts, with SmolLM2-135M's and ViT-B/16's shapes. The time within each call of a guard is
added up, once the device is done with what came before. The check of weights before a save is shared out to the steps
between two checkpoints. About two minutes on two cores.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks import counting
from benchmarks.lengths import draw_records, write_records
from benchmarks.report import below, report
from benchmarks.shapes import SHAPES, write_parts
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import Steps, run_ours, silence_libraries, synchronized_time
from vlm.config.schema import RunConfig
from vlm.train.checkpoints.trainer import trained_tensors
from vlm.train.guards.logged_loss import LoggedLoss
from vlm.train.guards.step_guard import StepGuard
from vlm.train.guards.watchdog import Watchdog
from vlm.train.guards.weights import find_nonfinite

LIMIT = 0.02
"""The largest share of a step that they may cost."""
TIMED = (
    (StepGuard, "begin_step"), (StepGuard, "watch_loss"), (StepGuard, "judge"), (LoggedLoss, "begin_step"),
    (LoggedLoss, "end_step"), (Watchdog, "mark"), (Watchdog, "_write_heartbeat"),
)  # fmt: skip
"""What guards do between the first and the last step."""


@dataclass(frozen=True)
class Size:
    """The size of the measurement.

    Attributes:
        shape: the model's shape, a name of `SHAPES`.
        tokens: `trainer.max_tokens_per_batch`.
        steps: number of steps of one pack each; the first is not measured.
        bf16: whether matrix products run in bfloat16.
    """

    shape: str = "smol"
    tokens: int = 2048
    steps: int = 4
    bf16: bool = False


GPU = Size(tokens=16384, steps=30, bf16=True)
"""The size for one large GPU."""


@contextmanager
def timed_guards() -> Iterator[list[float]]:
    """Within, add the seconds of each call of a guard to the list."""
    seconds: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = synchronized_time()
            try:
                return method(*args, **kwargs)
            finally:
                seconds.append(synchronized_time() - start)

        return call

    with ExitStack() as stack:
        for owner, name in TIMED:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        yield seconds


def measure(size: Size, folder: Path) -> tuple[Steps, float, float]:
    """Return the steps of a run, the seconds that guards took in each of them, and those of a check of the weights."""
    shape = SHAPES[size.shape]
    write_parts(folder / "parts", shape)
    records = counting.select_records(draw_records(size.steps * size.tokens // 50), shape, size.tokens, size.steps)
    path = write_records(folder / "data", records, shape.side)
    words = [f"trainer.max_tokens_per_batch={size.tokens}", f"trainer.bf16={str(size.bf16).lower()}"]
    with timed_guards() as seconds:
        steps = run_ours(folder / "parts", path, folder / "run", *words)
    trainer = steps.trainer
    start = synchronized_time()
    assert find_nonfinite(trained_tensors(trainer.model, trainer.parts).items()) == []
    return steps, sum(seconds) / len(steps.seconds), synchronized_time() - start


def main() -> None:
    """Measure and report."""
    args = make_parser(__doc__, ("tokens", "steps")).parse_args()
    silence_libraries()
    with tempfile.TemporaryDirectory() as name:
        steps, guards, check = measure(make_size(args, Size(), GPU), Path(name))
    step, interval = median(steps.seconds[1:]), float(RunConfig().trainer.save_steps)
    share = (guards + check / interval) / step
    row = below(f"guards, a save every {interval:.0f} steps", [share], "share of a step", "", LIMIT)
    notes = {"seconds of a step": step, "seconds of guards in it": guards, "seconds of a check of the weights": check}
    report("guards-gpu" if args.gpu else "guards", [row], notes)


if __name__ == "__main__":
    main()
