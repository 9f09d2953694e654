"""The line that tells how a run is doing: rewritten in place on a terminal, a line for each log in a file or a pipe.

An evaluation has a line of its own, which stays. Both go to `run.log` too.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.data.progress import shows_bars
from vlm.train.monitor.plots import Metrics
from vlm.train.monitor.run_log import IN_PLACE
from vlm.train.monitor.status import TRAINING, RunStatus

log = logging.getLogger(__name__)

TREND_LOGS = 20
"""The number of last logs whose losses the trend is of."""
MIN_TREND_LOGS = 5
"""The number of logs that a trend needs."""
TREND_ERRORS = 2.0
"""A trend is one where the slope of the losses is more than this many of its standard errors from 0."""
ARROWS = {"falling": "↘", "flat": "→", "rising": "↗", None: ""}
COLOURS = {"falling": "\x1b[32m", "rising": "\x1b[31m", "dim": "\x1b[2m"}
END_OF_COLOUR = "\x1b[0m"
REDRAW_SECONDS = 0.1
"""How often the line is drawn again at most, between two logs."""
RATE_NAMES = {"visual_encoder": "encoder", "language_model": "llm"}
"""How the line shortens the names of parts."""
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "image_gain_ci95", "blank_loss", "loss")
"""What an evaluation logs that is no metric of its own in its line."""


def find_trend(steps: Sequence[int], losses: Sequence[float]) -> str | None:
    """Return whether losses are `falling`, `flat` or `rising`; None where they are too few.

    It is the slope of the least-squares line through the last `TREND_LOGS` losses; `flat` where it is at most
    `TREND_ERRORS` of its standard errors from 0.
    """
    x, y = list(steps)[-TREND_LOGS:], list(losses)[-TREND_LOGS:]
    if len(y) < MIN_TREND_LOGS or not all(map(math.isfinite, y)):
        return None
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((step - mean_x) ** 2 for step in x)
    slope = sum((step - mean_x) * (loss - mean_y) for step, loss in zip(x, y, strict=True)) / spread
    rest = sum((loss - mean_y - slope * (step - mean_x)) ** 2 for step, loss in zip(x, y, strict=True))
    error = math.sqrt(rest / (len(x) - 2) / spread)
    if abs(slope) <= TREND_ERRORS * error:
        return "flat"
    return "falling" if slope < 0 else "rising"


def format_line(values: Mapping[str, object], width: int | None = None, *, coloured: bool = False) -> str:
    """Return a run's values, as `status.json` has them, in a line.

    Args:
        values: the values; those that are None are left out.
        width: the most columns; what matters least is left out of a longer line. None: any number.
        coloured: whether a falling loss is green and a rising one red.
    """
    fields = _list_fields(values)
    while width is not None and len(fields) > 2 and len("  ".join(text for _, text in fields)) > width:
        fields.remove(max(fields))
    line = "  ".join(text for _, text in fields)[:width]
    trend = values.get("loss_trend")
    if coloured and trend in COLOURS:
        arrow = ARROWS[str(trend)]
        line = line.replace(arrow, f"{COLOURS[str(trend)]}{arrow}{END_OF_COLOUR}")
    return line


def _list_fields(values: Mapping[str, object]) -> list[tuple[int, str]]:
    """Return how much the fields of a line matter, 0 the most, and their texts, in the order in which they stand."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    step, steps = values.get("step") or 0, values.get("max_steps")
    fields = [(0, f"step {step:,}" + (f"/{steps:,}" if steps else ""))]
    if "epoch" in numbers:
        fields.append((5, f"epoch {numbers['epoch']:.2f}"))
    if "loss" in numbers:
        arrow = ARROWS.get(values.get("loss_trend"), "")  # pyright: ignore[reportArgumentType, reportCallIssue]
        fields.append((1, f"loss {numbers['loss']:.4g}" + (f" {arrow}" if arrow else "")))
    rates = values.get("learning_rates")
    if isinstance(rates, Mapping) and rates:
        shown = [f"{RATE_NAMES.get(part, part)} {format_rate(rate)}" for part, rate in rates.items()]
        fields.append((6, f"lr {', '.join(shown)}"))
    if "tokens_per_second" in numbers:
        fields.append((3, f"{format_count(numbers['tokens_per_second'])} tokens/s"))
    elif "samples_per_second" in numbers:
        fields.append((3, f"{format_count(numbers['samples_per_second'])} samples/s"))
    if "mfu" in numbers:
        fields.append((4, f"MFU {numbers['mfu']:.1%}"))
    if "memory_bytes" in numbers:
        fields.append((7, f"{numbers['memory_bytes'] / 2**30:.2f} GiB"))
    if "waiting_share" in numbers:
        fields.append((8, f"data wait {numbers['waiting_share']:.0%}"))
    if "seconds_left" in numbers:
        fields.append((2, f"{format_seconds(numbers['seconds_left'])} left"))
    return fields


def format_count(number: float) -> str:
    """Return a number of something a second, short: `12.3k`."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def format_rate(rate: float) -> str:
    """Return a learning rate, short: `2e-5`, `1.85e-3`."""
    if not rate:
        return "0"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def format_seconds(seconds: float) -> str:
    """Return a time, short: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def format_evaluation(step: int, metrics: Mapping[str, float]) -> str:
    """Return the metrics of an evaluation in a line: the losses, the gain by images with its interval, then others."""
    values = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    fields = []
    if "loss" in values:
        fields.append(f"loss {values['loss']:.4g}")
    if "blank_loss" in values:
        fields.append(f"on blank images {values['blank_loss']:.4g}")
    if "image_gain" in values:
        interval = f" ± {values['image_gain_ci95']:.2g}" if "image_gain_ci95" in values else ""
        fields.append(f"image gain {values['image_gain']:.4g}{interval}")
    others = {name: value for name, value in values.items() if name not in (*NO_METRICS, "image_gain")}
    fields += [f"{name} {value:.4g}" for name, value in others.items()]
    time_taken = f"  ({format_seconds(values['runtime'])})" if "runtime" in values else ""
    return f"evaluation at step {step:,}:  {'  '.join(fields)}{time_taken}"


class ProgressLine(TrainerCallback):
    """Shows the progress of a run, and keeps its status; on all ranks it asks for a log of the last step.

    Args:
        status: of the run.
        is_writer: whether this rank shows anything.
    """

    def __init__(self, status: RunStatus, *, is_writer: bool):
        self.status, self.is_writer = status, is_writer
        self.bar: tqdm[object] | None = None
        self.steps: list[int] = []
        self.losses: list[float] = []
        self._first_step = self._drawn = 0.0
        self._steps_before = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Begin to show progress."""
        self._first_step, self._steps_before = 0.0, state.global_step
        self.status.update(state=TRAINING, step=state.global_step, max_steps=state.max_steps, epoch=state.epoch)
        if self.is_writer and not args.disable_tqdm and shows_bars():
            self.bar = tqdm(total=0, bar_format="{desc}", leave=True, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Ask for a log of the last step, so that a run that is shorter than `logging_steps` has one; count steps."""
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
            log.info("%s", format_evaluation(state.global_step, logs))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Leave the last line as it is."""
        self.close()

    def close(self) -> None:
        """Let go of the terminal, whether the run has ended or failed."""
        if self.bar is not None:
            self._draw(time.perf_counter())
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
            state=TRAINING, step=state.global_step, max_steps=state.max_steps, epoch=state.epoch,
            loss=finite_or_none(logs.get("loss")), loss_trend=find_trend(self.steps, self.losses),
            learning_rates={k.removeprefix(prefix): v for k, v in logs.items() if k.startswith(prefix)},
            **{name: logs[name] for name in measured},
            **({} if memory is None else {"memory_bytes": round(memory * 2**30)}),
            **({"waiting_share": logs["data_wait_share"]} if "data_wait_share" in logs else {}),
        )  # fmt: skip
        log.info("%s", format_line(self.status.values), extra={IN_PLACE: self.bar is not None})
        if self.bar is not None:
            self._draw(time.perf_counter())

    def _draw(self, now: float) -> None:
        assert self.bar is not None
        self._drawn = now
        width, coloured = shutil.get_terminal_size().columns - 1, not os.environ.get("NO_COLOR")
        self.bar.set_description_str(format_line(self.status.values, width, coloured=coloured))


def finite_or_none(value: float | None) -> float | None:
    """Return a number that JSON has, or None."""
    return value if value is not None and math.isfinite(value) else None
