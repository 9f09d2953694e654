"""Formats the progress line of a run, and the lines of its evaluations.

`train/monitor` shows them during training, `vlm watch` from the files of a run. Imports the standard library only.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import linear_regression, pvariance

STATUS_FILE = "status.json"
ACTIVE_STATES = STARTING, TRAINING, EVALUATING, SAVING = "starting", "training", "evaluating", "saving"
ENDED_STATES = DONE, STOPPED, FAILED, REFUSED = "done", "stopped", "failed", "refused"
"""`refused`: the run ended before its first step, because of something that the user has to fix."""
TREND_LOGS = 20
"""Number of logs, counted from the last one, from which the trend is computed."""
MIN_TREND_LOGS = 5
"""The number of logs that a trend needs."""
TREND_ERRORS = 2.0
"""The slope of the losses counts as a trend if it is more than this many standard errors from 0."""
ARROWS = {"falling": "↘", "flat": "→", "rising": "↗", None: ""}
COLOURS = {"falling": "\x1b[32m", "rising": "\x1b[31m", "dim": "\x1b[2m"}
END_OF_COLOUR = "\x1b[0m"
RATE_NAMES = {"visual_encoder": "encoder", "language_model": "llm"}
"""Part -> its short name in the line."""
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "epoch")
"""Logged values of an evaluation that are not metrics."""
FIRST_METRICS = {"loss": "loss", "blank_loss": "on blank images", "image_gain": "image gain"}
"""Metric -> its name in the line of an evaluation, which begins with these."""
INTERVAL_SUFFIX = "_ci95"
"""The ending of the name of half the width of a metric's 95% interval."""


def find_trend(steps: Sequence[int], losses: Sequence[float]) -> str | None:
    """Return whether losses are `falling`, `flat` or `rising`; None if they are too few.

    This is the slope of the least-squares line through the last `TREND_LOGS` losses; it is `flat` if the slope is at
    most `TREND_ERRORS` standard errors from 0.
    """
    x, y = list(steps)[-TREND_LOGS:], list(losses)[-TREND_LOGS:]
    if len(y) < MIN_TREND_LOGS or not all(map(math.isfinite, y)):
        return None
    slope, intercept = linear_regression(x, y)
    rest = sum((loss - intercept - slope * step) ** 2 for step, loss in zip(x, y, strict=True))
    error = math.sqrt(rest / (len(x) - 2) / (pvariance(x) * len(x)))
    if abs(slope) <= TREND_ERRORS * error:
        return "flat"
    return "falling" if slope < 0 else "rising"


def format_line(values: Mapping[str, object], width: int | None = None, *, coloured: bool = False) -> str:
    """Return the values of a run, as in `status.json`, on one line.

    Args:
        values: the values; None values are left out.
        width: the maximum number of columns; a longer line drops the least important values. None: no limit.
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
    """Return rank and text of each field of a line, in order; fields of rank 0 are the most important."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    step, steps = values.get("step") or 0, values.get("max_steps")
    fields = [(0, f"step {step:,}" + (f"/{steps:,}" if steps else ""))]
    if "epoch" in numbers:
        fields.append((5, f"epoch {numbers['epoch']:.2f}"))
    if "loss" in numbers:
        arrow = ARROWS.get(values.get("loss_trend"), "")
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
    """Return a number per second in short form: `12.3k`."""
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
    """Return the metrics of an evaluation in a line, with their intervals: losses, the gain by images, then others."""
    values = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    others = [
        name for name in values if not name.endswith(INTERVAL_SUFFIX) and name not in (*NO_METRICS, *FIRST_METRICS)
    ]
    fields = []
    for name in (*(first for first in FIRST_METRICS if first in values), *others):
        width = values.get(f"{name}{INTERVAL_SUFFIX}")
        interval = "" if width is None else f" ± {width:.2g}"
        fields.append(f"{FIRST_METRICS.get(name, name)} {values[name]:.4g}{interval}")
    time_taken = f"  ({format_seconds(values['runtime'])})" if "runtime" in values else ""
    return f"evaluation at step {step:,}:  {'  '.join(fields)}{time_taken}"
