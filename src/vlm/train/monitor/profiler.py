"""`trainer.profile`: a trace of a few steps, and a table of where their time went.

The forward time of a part is the time within the calls of its modules. A gradient has the autograd sequence number of
its operation, and belongs to the part in whose call the operation ran. The vocabulary head runs with the loss, so its
time counts for the loss; if all logits are computed at once, it counts for the language model. Evaluation, saving and
logging are in the trace, but do not count for any step.
"""

import logging
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.assembly.model_interface import TrainableModel
from vlm.config.schema import HEAD, PARTS
from vlm.families.parts import get_part_names
from vlm.train.monitor.peak_flops import synchronize
from vlm.train.monitor.speed import BETWEEN_STEPS

log = logging.getLogger(__name__)

SKIPPED_STEPS, WARMUP_STEPS, ACTIVE_STEPS = 2, 1, 4
"""Numbers of steps that are skipped, that warm up the profiler, and that are in the trace."""

DATA_WAIT, LOSS, OPTIMISER_ROW, OTHER_ROW = "data wait", "loss", "optimiser", "everything else"
STEP_EVENT_PREFIX = "ProfilerStep"
GRADIENT_EVENT_PREFIX = "autograd::engine::evaluate_function: "
OPTIMISER_EVENT_PREFIX = "Optimizer.step#"
BACKWARD_SCOPE = 1
"""The scope of the operations of gradients, as `torch.profiler` numbers it."""

NUM_OPERATORS = 40
"""Number of operators in the table."""


class ProfilerCallback(TrainerCallback):
    """Profiles `ACTIVE_STEPS` steps after `SKIPPED_STEPS + WARMUP_STEPS`, counted from the start of this call.

    `folder` gets `trace.json.gz` and `table.txt`, in which each part of the model has rows of its own.
    """

    def __init__(self, folder: Path, model: TrainableModel):
        self.folder, self.parts = folder, part_modules(model)
        self.hooks: list[RemovableHandle] = []
        self.running: profile | None = None
        self.steps = 0
        self.written = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Start the profiler."""
        for name, modules in self.parts.items():
            for module in modules:
                self.hooks += _name_calls(module, name)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device.type == "cuda" else [])]
        plan = schedule(wait=SKIPPED_STEPS, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1)
        self.running = profile(activities=kinds, schedule=plan, on_trace_ready=self._write)
        self.running.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Go to the next step; stop once the trace is complete."""
        if self.running is None:
            return
        self.steps += 1
        synchronize(args.device)  # the kernels that a step started belong to it
        self.running.step()
        if self.steps == SKIPPED_STEPS + WARMUP_STEPS + ACTIVE_STEPS:
            self._stop()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Write the steps so far if the run was shorter."""
        self._stop()
        if not self.written:
            message = "trainer.profile=true: nothing was profiled: the run had %d steps, and the first %d are left out"
            log.warning(message, self.steps, SKIPPED_STEPS + WARMUP_STEPS)

    def _stop(self) -> None:
        if self.running is not None:
            running, self.running = self.running, None
            running.stop()
            for hook in self.hooks:
                hook.remove()

    def _write(self, finished_profile: profile) -> None:
        """Write trace and table, if they have any step."""
        steps = self.steps - SKIPPED_STEPS - WARMUP_STEPS
        if steps < 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        finished_profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        text = profile_table(finished_profile, list(self.parts), steps)
        (self.folder / "table.txt").write_text(text, encoding="utf-8")
        log.info("Profile of %d steps: %s\n\n%s", steps, self.folder, text.split("\n\n")[0])
        self.written = True


def part_modules(model: TrainableModel) -> dict[str, list[nn.Module]]:
    """Return part -> the modules that are called for it, from the table of families."""
    by_part: dict[str, list[nn.Module]] = {}
    modules = dict(model.named_modules())
    for prefix, part in get_part_names(model.config).prefixes.items():
        if (module := modules.get(prefix.removesuffix("."))) is not None:
            by_part.setdefault(part, []).extend(module if isinstance(module, nn.ModuleList) else [module])
    return {part: by_part[part] for part in (*PARTS, HEAD) if part in by_part}


def _name_calls(module: nn.Module, name: str) -> list[RemovableHandle]:
    """Make every call of a module run in a profiler range of this name."""
    ranges: list[record_function] = []

    def open_range(module: nn.Module, args: object) -> None:
        """Begin the range of a call."""
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    def close_range(module: nn.Module, args: object, output: object) -> None:
        """End the range of the innermost call."""
        ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(open_range), module.register_forward_hook(close_range, always_call=True)]


def profile_table(finished_profile: profile, parts: Sequence[str], steps: int) -> str:
    """Return a table of the time of the profiled steps, by part and by operator."""
    rows, whole, on_device = time_by_part(finished_profile.events() or [], parts)
    lines = [
        ("", "ms a step", "share", "GPU ms a step"),
        *(
            (name, f"{host / steps / 1e3:.2f}", f"{host / whole:.1%}", f"{device / steps / 1e3:.2f}")
            for name, (host, device) in rows.items()
        ),
        ("whole step", f"{whole / steps / 1e3:.2f}", f"{1:.1%}"),
    ]
    lines = [line[: 4 if on_device else 3] for line in lines]
    by_part = tabulate(lines, tablefmt="plain", colalign=("left", *["right"] * 3), disable_numparse=True)
    by = "self_device_time_total" if on_device else "self_cpu_time_total"
    operators = finished_profile.key_averages().table(sort_by=by, row_limit=NUM_OPERATORS, max_name_column_width=60)
    return f"{by_part}\n\n{operators}\n"


def time_by_part(events: Sequence[FunctionEvent], parts: Sequence[str]) -> tuple[dict[str, np.ndarray], float, bool]:
    """Return microseconds of host and kernels by row, those of whole steps, and whether there is a GPU.

    `parts` names the ranges in which parts ran. The time of nested ranges counts for the innermost one.
    """
    within_steps, between = _exclude_between_steps(events)
    events = [event for event in within_steps if _is_host_event(event)]
    kernels = [event for event in within_steps if not _is_host_event(event) and not event.is_user_annotation]
    calls = CallTree([event for event in events if event.name in (*parts, LOSS)])
    spent: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for event, host, device in calls.self_times():
        spent[f"{event.name} forward"] += (host, device)
    part_by_number = calls.parts_by_sequence_number(events)
    for event in events:
        if event.name.startswith(GRADIENT_EVENT_PREFIX) and event.sequence_nr in part_by_number:
            row = f"{part_by_number[event.sequence_nr]} backward"
        elif event.name == DATA_WAIT:
            row = DATA_WAIT
        elif event.name.startswith(OPTIMISER_EVENT_PREFIX):
            row = OPTIMISER_ROW
        else:
            continue
        spent[row] += (event.cpu_time_total, event.device_time_total)
    names = [DATA_WAIT, *(f"{part} {way}" for part in (*parts, LOSS) for way in ("forward", "backward")), OPTIMISER_ROW]
    rows = {name: spent[name] for name in names if name in spent}
    whole = sum(event.time_range.elapsed_us() for event in events if event.name.startswith(STEP_EVENT_PREFIX)) - between
    busy = sum(event.time_range.elapsed_us() for event in kernels)
    rows[OTHER_ROW] = np.maximum(np.array([whole, busy]) - sum(rows.values()), 0.0)
    return rows, whole, bool(kernels)


def _exclude_between_steps(events: Sequence[FunctionEvent]) -> tuple[list[FunctionEvent], float]:
    """Return the events within steps, and the microseconds that passed between steps."""
    pauses = [event.time_range for event in events if event.name == BETWEEN_STEPS and _is_host_event(event)]

    def is_in_pause(event: FunctionEvent) -> bool:
        """Return whether an event began between two steps."""
        return any(pause.start <= event.time_range.start < pause.end for pause in pauses)

    return [event for event in events if not is_in_pause(event)], sum(pause.elapsed_us() for pause in pauses)


class CallTree:
    """The nested calls of parts in a profile; `events` are their ranges."""

    def __init__(self, events: Iterable[FunctionEvent]):
        self.events = sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))
        self.starts = [event.time_range.start for event in self.events]
        self.enclosing: list[int] = []
        for index, event in enumerate(self.events):
            self.enclosing.append(self._innermost(index - 1, event.time_range.start))

    def _innermost(self, index: int, timestamp: float) -> int:
        """Return the index of the innermost call at a time, of those up to `index`; -1: none."""
        while index >= 0 and self.events[index].time_range.end < timestamp:
            index = self.enclosing[index]
        return index

    def self_times(self) -> Iterator[tuple[FunctionEvent, float, float]]:
        """Yield each call with its time on host and device, without that of nested calls."""
        host = [event.cpu_time_total for event in self.events]
        device = [event.device_time_total for event in self.events]
        for event, enclosing in zip(self.events, self.enclosing, strict=True):
            if enclosing >= 0:
                host[enclosing] -= event.cpu_time_total
                device[enclosing] -= event.device_time_total
        yield from zip(self.events, host, device, strict=True)

    def parts_by_sequence_number(self, events: Iterable[FunctionEvent]) -> dict[int, str]:
        """Return autograd's sequence number of an operation -> the part in whose call it ran.

        Operations without a gradient have the number of the next one that has, so the last one of a number counts.
        """
        last: dict[int, float] = {}
        for event in events:
            is_gradient = event.scope == BACKWARD_SCOPE or event.name.startswith(GRADIENT_EVENT_PREFIX)
            if event.sequence_nr >= 0 and not is_gradient:
                last[event.sequence_nr] = max(event.time_range.start, last.get(event.sequence_nr, 0.0))
        parts = {}
        for number, timestamp in last.items():
            index = self._innermost(bisect_right(self.starts, timestamp) - 1, timestamp)
            if index >= 0:
                parts[number] = self.events[index].name
        return parts


def _is_host_event(event: FunctionEvent) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU
