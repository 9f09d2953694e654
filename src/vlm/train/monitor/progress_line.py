"""The progress line of a run: rewritten in place on a terminal, one line for each log in a file or a pipe.

Each evaluation has its own line, which stays; on a terminal, of evaluations in quick succession only some have one. All
lines also go to `run.log`.
"""

import logging
import math
import os
import shutil
import sys
import time
from contextlib import ExitStack, redirect_stdout
from typing import NoReturn, TextIO, cast

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.data.progress import shows_bars
from vlm.runs.status_line import TRAINING, TREND_LOGS, find_trend, format_evaluation, format_line
from vlm.train.monitor.plots import Metrics
from vlm.train.monitor.run_log import IN_PLACE
from vlm.train.monitor.status import RunStatus

log = logging.getLogger(__name__)

REDRAW_SECONDS = 0.1
"""The minimum number of seconds between two drawings of the line, between logs."""
EVALUATION_SECONDS = 10.0
"""The minimum number of seconds between two lines of evaluations on a terminal; the last step has one anyway."""


class PrintedAbove:
    """Standard output while a line is rewritten in place: printed lines appear above it."""

    def __init__(self, stream: TextIO, bar: "tqdm[NoReturn]"):
        self._stream, self._bar, self._rest = stream, bar, ""

    def __getattr__(self, name: str) -> object:
        """Return an attribute of the stream."""
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        """Return whether it is this stream; tqdm clears its bars before it writes to a stream that it knows."""
        return other is self or other is self._stream

    __hash__ = object.__hash__

    def write(self, text: str) -> int:
        """Print complete lines, and keep the rest."""
        lines, end, self._rest = (self._rest + text).rpartition("\n")
        if end:
            self._bar.clear()
            self._stream.write(lines + end)
            self._stream.flush()
            self._bar.refresh()
        return len(text)

    def close(self) -> None:
        """Print what is left."""
        if self._rest:
            self.write("\n")


class ProgressLine(TrainerCallback):
    """Shows the progress of a run, and updates its status; on all ranks it requests a log of the last step.

    Args:
        status: the status of the run.
        is_writer: whether this rank shows progress.
    """

    def __init__(self, status: RunStatus, *, is_writer: bool):
        self.status, self.is_writer = status, is_writer
        self.bar: tqdm[NoReturn] | None = None
        self.steps: list[int] = []
        self.losses: list[float] = []
        self._first_step = self._drawn = 0.0
        self._steps_before = 0
        self._evaluation_shown = -math.inf
        self._redirected = ExitStack()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Begin to show progress."""
        self._first_step, self._steps_before = 0.0, state.global_step
        self.status.update(state=TRAINING, step=state.global_step, max_steps=state.max_steps, epoch=state.epoch)
        if self.is_writer and not args.disable_tqdm and shows_bars():
            self.bar = tqdm(total=0, bar_format="{desc}", leave=True, dynamic_ncols=True)
            printed = cast(TextIO, PrintedAbove(sys.stdout, self.bar))  # such as by code of the user's own
            self._redirected.enter_context(redirect_stdout(printed))
            self._redirected.callback(printed.close)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Count steps, and request a log of the last step, so that runs shorter than `logging_steps` have one."""
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True
        if not self.is_writer:
            return
        now = time.perf_counter()
        if not self._first_step:  # which takes longer than others
            self._first_step, self._steps_before = now, state.global_step
        done = state.global_step - self._steps_before
        left = (now - self._first_step) / done * (state.max_steps - state.global_step) if done else None
        self.status.renew(step=state.global_step, epoch=state.epoch, seconds_left=left)
        if self.bar is not None and now - self._drawn > REDRAW_SECONDS:
            self._draw(now)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Metrics, **kwargs: object
    ):
        """Show what was logged."""
        if not self.is_writer:
            return
        if "loss" in logs or any(name.startswith("learning_rate/") for name in logs):
            self._take_log(state, logs)
        elif any(name.startswith("eval_") for name in logs):
            self._take_evaluation(state, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Leave the last line as it is."""
        self.close()

    def close(self) -> None:
        """Let go of the terminal, whether the run has ended or failed."""
        if self.bar is not None:
            self._draw(time.perf_counter())
            self._redirected.close()
            self.bar.close()
            self.bar = None

    def _take_log(self, state: TrainerState, logs: Metrics) -> None:
        if "loss" in logs:
            self.steps.append(state.global_step)
            self.losses.append(logs["loss"])
            del self.steps[:-TREND_LOGS], self.losses[:-TREND_LOGS]
        memory = logs.get("peak_memory_gib")
        prefix = "learning_rate/"
        measured = {"tokens_per_second", "mfu", "samples_per_second"} & logs.keys()
        self.status.update(
            state=TRAINING,
            step=state.global_step,
            max_steps=state.max_steps,
            epoch=state.epoch,
            loss=finite_or_none(logs.get("loss")),
            loss_trend=find_trend(self.steps, self.losses),
            learning_rates={k.removeprefix(prefix): v for k, v in logs.items() if k.startswith(prefix)},
            **{name: logs[name] for name in measured},
            **({} if memory is None else {"memory_bytes": round(memory * 2**30)}),
            **({"waiting_share": logs["data_wait_share"]} if "data_wait_share" in logs else {}),
        )
        log.info("%s", format_line(self.status.values), extra={IN_PLACE: self.bar is not None})
        if self.bar is not None:
            self._draw(time.perf_counter())

    def _take_evaluation(self, state: TrainerState, logs: Metrics) -> None:
        now = time.perf_counter()
        is_last = state.global_step >= state.max_steps
        is_shown = self.bar is None or is_last or now - self._evaluation_shown >= EVALUATION_SECONDS
        if is_shown:
            self._evaluation_shown = now
        log.info("%s", format_evaluation(state.global_step, logs), extra={IN_PLACE: not is_shown})

    def _draw(self, now: float) -> None:
        assert self.bar is not None
        self._drawn = now
        width, coloured = shutil.get_terminal_size().columns - 1, not os.environ.get("NO_COLOR")
        self.bar.set_description_str(format_line(self.status.values, width, coloured=coloured))


def finite_or_none(value: float | None) -> float | None:
    """Return a finite number, or None; JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
