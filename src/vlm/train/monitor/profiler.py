"""`trainer.profile`: a trace of a few steps, and a table of where their time went.

Time forward is that within a module's call. Time backward is found through the numbers that autograd gives: an
operation and its gradient have the same one, so the gradient belongs to the part in whose call the operation ran. Where
the vocabulary head runs in pieces with the loss, its time is the loss's, else the language model's. Evaluation, saving
and logging between steps are in the trace and among its operators, but of no step's time.
"""

import logging
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers import TrainerCallback, TrainerState

from vlm.assembly.model_interface import TrainableModel
from vlm.config.schema import HEAD, PARTS
from vlm.families.table import get_part_names
from vlm.train.monitor.speed import BETWEEN_STEPS

log = logging.getLogger(__name__)

SKIPPED_STEPS, WARMUP_STEPS, ACTIVE_STEPS = 2, 1, 4
"""Steps that are passed over, that the profiler warms up in, and that are in the trace."""

DATA_WAIT, LOSS, OPTIMISER_ROW, OTHER_ROW = "data wait", "loss", "optimiser", "everything else"
STEP_EVENT_PREFIX = "ProfilerStep"
GRADIENT_EVENT_PREFIX = "autograd::engine::evaluate_function: "
OPTIMISER_EVENT_PREFIX = "Optimizer.step#"
BACKWARD_SCOPE = 1
"""The scope of gradients' own operations, as `torch.profiler` numbers it."""

NUM_OPERATORS = 40
"""So many operators are in the table."""


class ProfilerCallback(TrainerCallback):
    """Profiles steps `BEFORE + WARMUP_STEPS + 1` and the `ACTIVE - 1` behind it, counted from where the run begins.

    Args:
        folder: where `trace.json.gz` and `table.txt` go.
        model: the model, whose parts are told apart.
    """

    def __init__(self, folder: Path, model: TrainableModel):
        self.folder, self.parts = folder, part_modules(model)
        self.hooks: list[Any] = []
        self.running: profile | None = None
        self.steps = 0
        self.written = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Begin."""
        for name, modules in self.parts.items():
            for module in modules:
                ranges: list[Any] = []
                self.hooks.append(module.register_forward_pre_hook(_open_range_hook(name, ranges)))
                self.hooks.append(module.register_forward_hook(_close_range_hook(ranges), always_call=True))
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device.type == "cuda" else [])]
        plan = schedule(wait=SKIPPED_STEPS, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1)
        self.running = profile(activities=kinds, schedule=plan, on_trace_ready=self._write)
        self.running.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Go on; stop where the trace is complete."""
        if self.running is None:
            return
        self.steps += 1
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)  # what a step started belongs to it
        self.running.step()
        if self.steps == SKIPPED_STEPS + WARMUP_STEPS + ACTIVE_STEPS:
            self._stop()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Of a run that is shorter, keep what there is."""
        self._stop()
        if not self.written:
            log.warning(
                "trainer.profile=true: this run had %d steps; the first %d are not in a profile, so there is none",
                self.steps, SKIPPED_STEPS + WARMUP_STEPS,
            )  # fmt: skip

    def _stop(self) -> None:
        if self.running is not None:
            running, self.running = self.running, None
            running.stop()
            for hook in self.hooks:
                hook.remove()

    def _write(self, finished_profile: profile) -> None:
        """Leave trace and table, where steps are in them."""
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
    """Part -> the modules that are called for it, of a model as the table of families has it."""
    finished_profile: dict[str, list[nn.Module]] = {}
    modules = dict(model.named_modules())
    for prefix, part in get_part_names(model.config).prefixes.items():
        if (module := modules.get(prefix.removesuffix("."))) is not None:
            finished_profile.setdefault(part, []).extend(module if isinstance(module, nn.ModuleList) else [module])
    decoder = model.get_decoder()  # it is called by itself where logits are computed in pieces
    if not any(decoder is module for module in finished_profile["language_model"]):
        finished_profile["language_model"].append(decoder)
    return {part: finished_profile[part] for part in (*PARTS, HEAD) if part in finished_profile}


def _open_range_hook(name: str, ranges: list[Any]) -> Any:
    """A hook before a module's call: a range of this name begins."""

    def open_range(module: nn.Module, args: Any) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    return open_range


def _close_range_hook(ranges: list[Any]) -> Any:
    """A hook behind a module's call: its range ends."""

    def close_range(module: nn.Module, args: Any, output: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    return close_range


def profile_table(finished_profile: profile, parts: Sequence[str], steps: int) -> str:
    """Where the time of so many steps went: by part, and by operator."""
    rows, whole, on_device = time_by_part(finished_profile.events() or [], parts)
    columns = ("", "ms a step", "share", "GPU ms a step")[: 4 if on_device else 3]
    lines = [columns]
    lines += [
        (name, f"{host / steps / 1e3:.2f}", f"{host / whole:.1%}", f"{device / steps / 1e3:.2f}")[: len(columns)]
        for name, (host, device) in rows.items()
    ]
    lines.append(("whole step", f"{whole / steps / 1e3:.2f}", f"{1:.1%}"))
    alignment = ("left", "right", "right", "right")[: len(columns)]
    by_part = tabulate(lines, tablefmt="plain", colalign=alignment, disable_numparse=True)
    by = "self_device_time_total" if on_device else "self_cpu_time_total"
    operators = finished_profile.key_averages().table(sort_by=by, row_limit=NUM_OPERATORS, max_name_column_width=60)
    return f"{by_part}\n\n{operators}\n"


def time_by_part(events: Iterable[Any], parts: Sequence[str]) -> tuple[dict[str, tuple[float, float]], float, bool]:
    """Microseconds on the host and of kernels, by what they were spent on; of whole steps; and whether there is a GPU.

    Args:
        events: of a profiler, see `torch.autograd.profiler_util.FunctionEvent`.
        parts: names of the ranges that parts ran in. Of a range within another, the time is counted in the inner one.
    """
    every, between = exclude_between_steps(events)
    events = [one for one in every if _is_host_event(one)]
    kernels = [one for one in every if not _is_host_event(one) and not one.is_user_annotation]
    calls = CallTree([one for one in events if one.name in (*parts, LOSS)])
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one, host, device in calls.self_times():
        _add(spent[f"{one.name} forward"], host, device)
    part_by_number = calls.parts_by_sequence_number(events)
    for one in events:
        if one.name.startswith(GRADIENT_EVENT_PREFIX) and one.sequence_nr in part_by_number:
            _add(spent[f"{part_by_number[one.sequence_nr]} backward"], one.cpu_time_total, one.device_time_total)
        elif one.name == DATA_WAIT or one.name.startswith(OPTIMISER_EVENT_PREFIX):
            name = DATA_WAIT if one.name == DATA_WAIT else OPTIMISER_ROW
            _add(spent[name], one.cpu_time_total, one.device_time_total)
    names = [DATA_WAIT, *(f"{one} {way}" for one in (*parts, LOSS) for way in ("forward", "backward")), OPTIMISER_ROW]
    rows = {name: (spent[name][0], spent[name][1]) for name in names if name in spent}
    whole = sum(one.time_range.elapsed_us() for one in events if one.name.startswith(STEP_EVENT_PREFIX)) - between
    busy = sum(one.time_range.elapsed_us() for one in kernels)
    known = [sum(row[side] for row in rows.values()) for side in (0, 1)]
    rows[OTHER_ROW] = (max(whole - known[0], 0.0), max(busy - known[1], 0.0))
    return rows, whole, bool(kernels)


def exclude_between_steps(events: Iterable[Any]) -> tuple[list[Any], float]:
    """The events that are not part of what a run did between its steps, and how many microseconds that took."""
    every = list(events)
    breaks = sorted(
        (one.time_range.start, one.time_range.end) for one in every if one.name == BETWEEN_STEPS and _is_host_event(one)
    )
    starts = [start for start, _ in breaks]

    def in_break(timestamp: float) -> bool:
        index = bisect_right(starts, timestamp) - 1
        return index >= 0 and timestamp < breaks[index][1]

    return [one for one in every if not in_break(one.time_range.start)], sum(end - start for start, end in breaks)


class CallTree:
    """The calls of parts in a profile, some within others.

    Args:
        events: the ranges that they ran in.
    """

    def __init__(self, events: Iterable[Any]):
        self.events = sorted(events, key=lambda one: (one.time_range.start, -one.time_range.end))
        self.starts = [one.time_range.start for one in self.events]
        self.enclosing: list[int] = []
        for index, one in enumerate(self.events):
            self.enclosing.append(self._innermost(index - 1, one.time_range.start))

    def _innermost(self, index: int, timestamp: float) -> int:
        """The number of the innermost call at a moment, of those up to `place`; -1: none."""
        while index >= 0 and self.events[index].time_range.end < timestamp:
            index = self.enclosing[index]
        return index

    def self_times(self) -> Iterator[tuple[Any, float, float]]:
        """Each call with the host's and the device's time that is in no call within it."""
        host = [one.cpu_time_total for one in self.events]
        device = [one.device_time_total for one in self.events]
        for one, enclosing in zip(self.events, self.enclosing, strict=True):
            if enclosing >= 0:
                host[enclosing] -= one.cpu_time_total
                device[enclosing] -= one.device_time_total
        yield from zip(self.events, host, device, strict=True)

    def parts_by_sequence_number(self, events: Iterable[Any]) -> dict[int, str]:
        """Autograd's number of an operation -> the part in whose call it ran.

        Operations without a gradient have the number of the next one that has: the last of a number is the one.
        """
        last: dict[int, float] = {}
        for one in events:
            if one.sequence_nr >= 0 and one.scope != BACKWARD_SCOPE and not one.name.startswith(GRADIENT_EVENT_PREFIX):
                last[one.sequence_nr] = max(one.time_range.start, last.get(one.sequence_nr, 0.0))
        finished_profile = {}
        for number, timestamp in last.items():
            index = self._innermost(bisect_right(self.starts, timestamp) - 1, timestamp)
            if index >= 0:
                finished_profile[number] = self.events[index].name
        return finished_profile


def _add(row: list[float], host: float, device: float) -> None:
    row[0] += host
    row[1] += device


def _is_host_event(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU
