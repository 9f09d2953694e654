"""What happens to a run while it goes: metrics, a loss plot and sample answers are left behind, and how it is ended."""

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.train.plots import draw_loss

log = logging.getLogger(__name__)
TERMINATED = 128 + signal.SIGTERM
"""With what a run ends that was asked to."""


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl` and redraws `loss.png` when a run evaluates, saves or ends."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self.plot = folder / "loss.png"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """A resumed run forgets what was logged after the checkpoint; a new one begins anew."""
        if state.is_world_process_zero:
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step and state.global_step]
            self.path.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any):
        """One line a log: the step, the epoch and what was logged; null where it was no number."""
        if state.is_world_process_zero and logs:
            shown = {key: value if math.isfinite(value) else None for key, value in logs.items()}  # JSON has no NaN
            line = {"step": state.global_step, **shown}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Redraw."""
        self._draw(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Redraw."""
        self._draw(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Redraw."""
        self._draw(state)

    def _draw(self, state: TrainerState) -> None:
        if state.is_world_process_zero and self.path.exists():
            draw_loss(read_metrics(self.path), self.plot)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class StopAtNaN(TrainerCallback):
    """Ends a run whose loss is no number, before it spends another hour on it."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any):
        """Raises FloatingPointError where the training loss is NaN or infinite."""
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss is {logs['loss'] if logs else None} at step {state.global_step}: lower the learning rate, "
                "or train in bf16 or fp32 instead of fp16. Checkpoints in the run directory, if any, are from before."
            )


class StopWhenAsked(TrainerCallback):
    """SIGTERM ends a run behind the step that it is at, with a checkpoint to go on from.

    It may come several times, from whoever sends it and from a launcher that hands it on. Ranks get it at different
    steps, or only one of them does: they agree behind each step.

    Args:
        saves: whether there is a checkpoint to be left.
    """

    def __init__(self, *, saves: bool = True):
        self.saves = saves
        self.asked = self.agreed = False
        self.before: Any = signal.SIG_DFL
        self.process = os.getpid()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Listen; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._heard)

    def _heard(self, number: int, frame: Any) -> None:
        """Take note. Data workers are made with this too: the first signal, to all of a group, leaves them running."""
        self.asked = True
        if os.getpid() != self.process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Ask for a checkpoint where any rank was asked to end."""
        self.agreed = self._any_rank(args.device)
        if not self.agreed:
            return control
        if not self.saves:
            self._end("was asked to end, and there is nothing to go on from")
        control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any):
        """End, now that the checkpoint is complete."""
        if self.agreed:
            self._end(
                f"was asked to end and saved checkpoint-{state.global_step}; the same command with "
                f"trainer.output_dir={args.output_dir} trainer.resume_from_checkpoint=true goes on"
            )

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Listen no more."""
        self._restore()

    def _any_rank(self, device: torch.device) -> bool:
        if not dist.is_initialized():
            return self.asked
        heard = torch.tensor([int(self.asked)], device=device)
        dist.all_reduce(heard, op=dist.ReduceOp.MAX)
        return bool(heard.item())

    def _end(self, how: str) -> None:
        self._restore()
        log.info("The run %s", how)
        raise SystemExit(TERMINATED)

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)


class SampleAnswers(TrainerCallback):
    """Lets the model answer some samples at each evaluation and at the end; every rank takes part."""

    def __init__(self, answer: Callable[[int], None]):
        self.answer = answer
        self.answered_at = -1

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Answer, once a step."""
        self._answer(state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Answer, unless the last evaluation just did."""
        self._answer(state.global_step)

    def _answer(self, step: int) -> None:
        if step != self.answered_at:
            self.answer(step)
            self.answered_at = step


class EpochOrder(TrainerCallback):
    """Tells a sampler the epoch, also where wrappers of a resumed loader would not pass it on."""

    def __init__(self, sampler_of: Callable[[], Any]):
        self.sampler_of = sampler_of

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """The epoch is the whole part of how far the run is."""
        if self.sampler_of() is not None:
            self.sampler_of().set_epoch(int(state.epoch or 0))
