"""The best model of a run by a metric of its evaluations: `trainer.keep_best`."""

import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from vlm.config.derived import lower_is_better
from vlm.config.schema import TrainerOptions

log = logging.getLogger(__name__)

BEST_FILE = "best.json"
"""The file of a checkpoint that says which evaluation was the best so far."""

BEST_FOLDER = "best"
"""The folder of a run with the complete model of its best evaluation."""

PREFIX = "eval_"


@dataclass(frozen=True)
class BestEvaluation:
    """The best evaluation so far: the metric's value and the step it was measured after."""

    value: float
    step: int


class BestModel:
    """Tracks the best evaluation of a run and saves it with checkpoints; a `SavedWithCheckpoint`.

    Args:
        metric: the name of a metric of evaluations, with `eval_` or without.
        greater_is_better: which of two values is better; None: by the metric's name.
        is_writer: whether this rank writes.
        is_defined_at_times: whether evaluations may lack the metric, because it is undefined for some outputs.
    """

    def __init__(
        self, metric: str, greater_is_better: bool | None, *, is_writer: bool, is_defined_at_times: bool = False
    ):
        self.name = f"{PREFIX}{metric.removeprefix(PREFIX)}"
        self.sign = -1 if greater_is_better is False or (greater_is_better is None and lower_is_better(metric)) else 1
        self.is_writer, self.is_defined_at_times = is_writer, is_defined_at_times
        self.best: BestEvaluation | None = None
        self.before: BestEvaluation | None = None

    @classmethod
    def of_run(cls, options: TrainerOptions, known_metrics: Collection[str] | None, *, is_writer: bool) -> Self | None:
        """Return the `BestModel` that `trainer.keep_best` asks for, or None if it is not set.

        A metric among `known_metrics` may be undefined for some outputs; None: the metrics are not known.
        """
        if options.keep_best is None:
            return None
        is_known = known_metrics is not None
        return cls(options.keep_best, options.greater_is_better, is_writer=is_writer, is_defined_at_times=is_known)

    @property
    def step(self) -> int | None:
        """The step of the best evaluation; None: there is none yet."""
        return None if self.best is None else self.best.step

    def is_new(self, step: int) -> bool:
        """Return whether the best evaluation is the one after this step."""
        return self.step == step

    def update(self, metrics: Mapping[str, float], step: int) -> bool:
        """Return whether an evaluation is the best so far, and remember it.

        Raises:
            ValueError: evaluations do not have the metric.
        """
        value = metrics.get(self.name)
        if value is None:
            if self.is_defined_at_times:
                log.info("%s is undefined at step %d, so trainer.keep_best ignores it", self.name, step)
                return False
            known = ", ".join(sorted(metrics))
            raise ValueError(f"trainer.keep_best={self.name}: no evaluation measures it; allowed are {known}")
        if math.isnan(value) or (self.best is not None and self.sign * value <= self.sign * self.best.value):
            return False
        self.best, self.before = BestEvaluation(value, step), self.best
        return True

    def revert(self) -> None:
        """Restore the previous best evaluation, because the model of this one could not be written."""
        self.best = self.before

    def describe(self) -> str:
        """Return the best evaluation in words."""
        return f"{self.name}={self.best.value:.4g} at step {self.best.step}" if self.best else f"no {self.name} yet"

    def save_to(self, checkpoint: Path) -> None:
        """Write which evaluation was the best, into a checkpoint or next to its model."""
        if self.is_writer and self.best is not None:
            content = {"metric": self.name, **asdict(self.best)}
            (checkpoint / BEST_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def load_from(self, checkpoint: Path) -> None:
        """Read the best evaluation; a run that is resumed with another metric starts comparing from scratch."""
        file = checkpoint / BEST_FILE
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if content.pop("metric", None) == self.name:
            self.best = BestEvaluation(**content)
