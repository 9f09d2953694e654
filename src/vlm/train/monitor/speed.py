"""The speed of a run: real tokens, samples and operations per second, the cost of padding and waiting, and memory.

The clock runs from fetching the batches of a step to the end of its update. Evaluation, saving, sample answers and
logging do not count, nor does the first step of a call, in which kernels are chosen and data workers start. The device
is synchronised only when a run waits for it anyway: when it logs, evaluates or saves.
"""

import json
import logging
import operator
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.assembly.model_kinds import is_composed_model
from vlm.data.batching.stats import BatchStats, num_encoded_and_connected
from vlm.data.blank_images import dummy_image
from vlm.train.model import compute_dtype
from vlm.train.monitor.flops import FlopsNotCountable, StepFlops, count_flops
from vlm.train.monitor.peak_flops import Peak, get_peak_tflops, measure_tflops, synchronize
from vlm.train.objectives.base import PreparedRun

log = logging.getLogger(__name__)

T = TypeVar("T")

SPEED_FILE = "speed.json"
BETWEEN_STEPS = "between steps"
"""The name of evaluation, saving and logging in a profile."""

METRIC_LABELS = {
    "tokens_per_second": ("tokens a second, all ranks", ",.0f"),
    "supervised_tokens_per_second": ("supervised tokens a second", ",.0f"),
    "samples_per_second": ("samples a second", ",.2f"),
    "seconds_per_step": ("seconds a step", ".4f"),
    "padding_share": ("padding, share of positions", ".1%"),
    "data_wait_share": ("waiting for data, share of time", ".1%"),
    "tflops_per_second": ("model TFLOP/s, each device", ".3f"),
    "mfu": ("model FLOPs utilisation", ".1%"),
    "peak_memory_gib": ("peak memory of a device, on a CPU of the process, GiB", ".2f"),
}
"""Metric -> its label and format in the table at the end of a run."""


@dataclass
class StepCounts:
    """Counts over some steps, of one rank or of several.

    A batch is a forward and a backward pass; images are encoded by the visual encoder and connected by the connector;
    `waiting` is how many of the `seconds` the loop waited for data.
    """

    steps: float = 0
    batches: float = 0
    encoded: float = 0
    connected: float = 0
    waiting: float = 0
    seconds: float = 0

    def __add__(self, other: "StepCounts") -> "StepCounts":
        """Add the counts of other steps."""
        return StepCounts(*map(operator.add, astuple(self), astuple(other)))


class SpeedMeter:
    """Measures the steps of a run.

    If the operations of the model (`flops`) are unknown, `note` says why in `speed.json`. Without a folder, this file
    is not written; only the first rank has one. `dtype` is the run's precision, in which a peak is measured.
    """

    def __init__(
        self,
        device: torch.device,
        flops: StepFlops | None = None,
        peak: Peak | None = None,
        *,
        note: str | None = None,
        folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.device, self.dtype = device, dtype
        self.flops, self.peak, self.note, self.folder = flops, peak, note, folder
        self.interval, self.interval_stats = StepCounts(), BatchStats()
        self.total_counts, self.total_stats = StepCounts(), BatchStats()
        self.num_ranks, self.memory = 1, 0.0
        self._remeasured = False
        self._num_steps_begun = 0
        self._run_start: float | None = None
        self._wait_start: float | None = None
        self._break: torch.profiler.record_function | None = None

    # --- the clock ------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Start the clock, from the second step on."""
        self.end_break()
        self._num_steps_begun += 1
        if self._num_steps_begun == 2:
            synchronize(self.device)
        if self._num_steps_begun > 1 and self._run_start is None:
            self._run_start = time.perf_counter()

    def begin_break(self) -> None:
        """Make a profile show the time from now on as `BETWEEN_STEPS`."""
        if self._break is None:
            self._break = torch.profiler.record_function(BETWEEN_STEPS)
            self._break.__enter__()

    def end_break(self) -> None:
        """End what `begin_break` began."""
        if self._break is not None:
            self._break.__exit__(None, None, None)
            self._break = None

    def begin_data_wait(self) -> None:
        """Note that the loop starts to wait for data, for example at the start of an epoch."""
        self._wait_start = time.perf_counter() if self._run_start is not None else None

    def time_waits(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same batches, and count the time that the loop waits for each."""
        while True:
            start = self._wait_start or time.perf_counter()
            self._wait_start = None
            try:
                with torch.profiler.record_function("data wait"):
                    batch = next(batches)
            except StopIteration:
                return
            if self._run_start is not None:
                self.interval.waiting += time.perf_counter() - start
            yield batch

    def add(self, batches: Sequence[tuple[BatchStats, int, int]]) -> None:
        """Count the batches of a step: the statistics of each, and its encoded and connected images."""
        if self._run_start is None or not batches:
            return
        stats, encoded, connected = zip(*batches, strict=True)
        self.interval_stats = sum(stats, self.interval_stats)
        self.interval += StepCounts(1, len(batches), sum(encoded), sum(connected))

    def stop(self, *, wait_for_device: bool = False) -> None:
        """Stop the clock until the next step; with `wait_for_device`, once the device is idle."""
        if self._run_start is not None:
            if wait_for_device:
                synchronize(self.device)
            self.interval.seconds += time.perf_counter() - self._run_start
            self._run_start = self._wait_start = None

    # --- the numbers ----------------------------------------------------------------------------------------------

    def gather_metrics(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the metrics of the steps since the last call, over all ranks; every rank must call this.

        `gather` returns `(ranks, N)` of all ranks for `(1, N)` of this one.
        """
        numbers = [*astuple(self.interval_stats), *astuple(self.interval), peak_memory(self.device)]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        by_rank = gather(torch.tensor([numbers], dtype=dtype, device=self.device)).cpu()
        self.num_ranks, self.memory = len(by_rank), float(by_rank[:, -1].max())
        sums = by_rank.sum(0).tolist()
        num_stats = len(fields(BatchStats))
        stats, counts = BatchStats(*map(round, sums[:num_stats])), StepCounts(*sums[num_stats:-1])
        counts.steps /= self.num_ranks
        self.interval, self.interval_stats = StepCounts(), BatchStats()
        self.total_counts += counts
        self.total_stats += stats
        return self._compute_metrics(stats, counts)

    def _compute_metrics(self, stats: BatchStats, counts: StepCounts) -> dict[str, float]:
        """Return the metrics of some steps; none without steps."""
        if not counts.seconds or not counts.steps:
            return {}
        seconds = counts.seconds / self.num_ranks
        metrics = {"samples_per_second": stats.samples / seconds}
        if stats.positions:
            metrics = {
                "tokens_per_second": stats.tokens / seconds,
                "supervised_tokens_per_second": stats.supervised / seconds,
                **metrics,
                "padding_share": 1 - stats.tokens / stats.positions,
            }
        metrics["data_wait_share"] = counts.waiting / counts.seconds
        if self.flops is not None:
            operations = self.flops.total(stats, counts.encoded, counts.connected, counts.batches)
            metrics["tflops_per_second"] = operations / counts.seconds / 1e12
            if (mfu := self._compute_mfu(metrics["tflops_per_second"])) is not None:
                metrics["mfu"] = mfu
        return {**metrics, "peak_memory_gib": self.memory}

    def _compute_mfu(self, tflops: float) -> float | None:
        """Return the share of the peak; None if it is unknown.

        If the run exceeds a measured peak, the machine was busy during the measurement. The peak is then measured once
        more; if the run exceeds it again, the share is unknown.
        """
        if self.peak is not None and self.peak.is_measured and tflops > self.peak.tflops and not self._remeasured:
            self._remeasured = True
            again = measure_tflops(self.device, self.dtype)
            self.peak = replace(self.peak, tflops=max(again, self.peak.tflops))
        if self.peak is None or (self.peak.is_measured and tflops > self.peak.tflops):
            return None
        return tflops / self.peak.tflops

    def finish(self, gather: Callable[[Tensor], Tensor], last_step: int) -> None:
        """Stop the clock at the end of a call, and write its metrics to the log and `speed.json`; see `gather_metrics`.

        `last_step` is the number of the last update.
        """
        self.end_break()
        self.stop(wait_for_device=True)
        self.gather_metrics(gather)
        metrics = self._compute_metrics(self.total_stats, self.total_counts)
        if self.folder is None:
            return
        if not metrics:
            log.info("Speed was not measured: the run had only one step, and the first one does not count")
            return
        steps = round(self.total_counts.steps)
        seconds = self.total_counts.seconds / self.num_ranks
        metrics["seconds_per_step"] = seconds / steps
        title = f"steps {last_step - steps + 1} to {last_step} ({seconds:.1f} s; the first step is left out)"
        log.info("Speed of %s:\n\n%s\n", title, speed_table(metrics))
        if self.note is not None:
            log.info("TFLOP/s and MFU are unknown: %s", self.note)
        elif self.peak is not None and self.flops is not None and "mfu" not in metrics:
            log.info(
                "MFU is left out: the run is faster than the measured peak (%.3g TFLOP/s; was the machine busy?). "
                "Set trainer.peak_tflops",
                self.peak.tflops,
            )
        summary = {
            "first_step": last_step - steps + 1,
            "last_step": last_step,
            "seconds": seconds,
            "ranks": self.num_ranks,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            **metrics,
            "whole": {**asdict(self.total_stats), **asdict(self.total_counts)},
            "flops": self.flops and asdict(self.flops),
            "flops_note": self.note,
            "peak": self.peak and asdict(self.peak),
        }
        self.folder.joinpath(SPEED_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def speed_table(metrics: Mapping[str, float]) -> str:
    """Return metrics as a table, in the order of `METRIC_LABELS`."""
    rows = [(label, format(metrics[name], spec)) for name, (label, spec) in METRIC_LABELS.items() if name in metrics]
    return tabulate(rows, tablefmt="plain", colalign=("left", "right"), disable_numparse=True)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated on a GPU, or resident in this process without data workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**30 if sys.platform == "darwin" else used / 2**20


class SpeedCallback(TrainerCallback):
    """Stops the clock while a run logs, evaluates or saves. Must be the last callback, since others may request these.

    `VLMTrainer` starts the clock at the beginning of a step.
    """

    def __init__(self, meter: SpeedMeter):
        self.meter = meter

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Count the time until the first batch arrives as waiting for data."""
        self.meter.end_break()
        self.meter.begin_data_wait()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Stop the clock if something else happens between two steps."""
        if control.should_log or control.should_evaluate or control.should_save:
            self.meter.stop(wait_for_device=True)
        self.meter.begin_break()

    on_epoch_end = on_step_end


def count_images(model: PreTrainedModel, batch: Mapping[str, object], stats: BatchStats) -> tuple[int, int]:
    """Return how many images of a batch the visual encoder reads, and the connector."""
    encodes_duplicates = connects_duplicates = True
    if is_composed_model(model):
        model.train()  # as in training steps
        encodes_duplicates, connects_duplicates = model.encodes_duplicates(), model.connects_duplicates()
    return num_encoded_and_connected(batch, stats.images, encodes_duplicates, connects_duplicates)


def make_speed_meter(run: PreparedRun, folder: Path, peak_tflops: float | None, note: str | None) -> SpeedMeter:
    """Return the meter of a run. The first rank's writes a summary, with operations unless a note says why not."""
    args = run.args
    if args.process_index > 0:
        return SpeedMeter(args.device)
    if note is not None:
        return SpeedMeter(args.device, note=note, folder=folder)
    try:
        flops = count_flops(run.model, dummy_image(run.processor)[1])
    except FlopsNotCountable as reason:
        log.info("MFU is not logged, because the operations of this model cannot be counted: %s", reason)
        return SpeedMeter(args.device, note=str(reason), folder=folder)
    peak = get_peak_tflops(args.device, compute_dtype(args), peak_tflops)
    log.info("MFU is relative to a peak of %.3g TFLOP/s (%s)", peak.tflops, peak.source)
    return SpeedMeter(args.device, flops, peak, folder=folder, dtype=compute_dtype(args))
