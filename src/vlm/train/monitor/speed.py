"""The speed of a run: real tokens, samples and operations a second, the cost of padding and waiting, and memory.

The clock runs from fetching the batches of a step to the end of its update. Evaluation, saving, sample answers and
logging are not counted, nor is the first step of a call, in which kernels are chosen and data workers start. The device
is synchronised only where a run waits for it anyway: where it logs, evaluates or saves.
"""

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from tabulate import tabulate
from torch import Tensor

from vlm.data.batching.stats import BatchStats
from vlm.train.monitor.flops import StepFlops
from vlm.train.monitor.peak_flops import Peak

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
    "peak_memory_gib": ("peak memory of a device, GiB", ".2f"),
}
"""Metric -> its label and format in the table at the end of a run."""


@dataclass
class StepCounts:
    """Counts over some steps, of one rank or of several.

    Attributes:
        steps: updates.
        batches: forward and backward passes.
        encoded: images that the visual encoder encoded.
        connected: images that the connector projected.
        waiting: seconds that the loop waited for data.
        seconds: the duration of the steps.
    """

    steps: float = 0
    batches: float = 0
    encoded: float = 0
    connected: float = 0
    waiting: float = 0
    seconds: float = 0

    def add(self, other: "StepCounts") -> None:
        """Add the counts of other steps."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class SpeedMeter:
    """Measures the steps of a run.

    Args:
        device: the model's device.
        flops: the operations of this model; None: unknown.
        peak: the peak of the device; None: unknown.
        note: why operations are unknown, for `speed.json`.
        folder: the folder of `speed.json`; None: it is not written, as on all ranks but the first.
    """

    def __init__(
        self,
        device: torch.device,
        flops: StepFlops | None = None,
        peak: Peak | None = None,
        *,
        note: str | None = None,
        folder: Path | None = None,
    ):
        self.device = device
        self.flops, self.peak, self.note, self.folder = flops, peak, note, folder
        self.interval, self.interval_stats = StepCounts(), BatchStats()
        self.total_counts, self.total_stats = StepCounts(), BatchStats()
        self.num_ranks, self.memory = 1, 0.0
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
            self._synchronize_device()
        if self._num_steps_begun > 1 and self._run_start is None:
            self._run_start = time.perf_counter()

    def begin_break(self) -> None:
        """Let a profile show the time from now on as `BETWEEN_STEPS`."""
        if self._break is None:
            self._break = torch.profiler.record_function(BETWEEN_STEPS)
            self._break.__enter__()

    def end_break(self) -> None:
        """End what `begin_break` began."""
        if self._break is not None:
            self._break.__exit__(None, None, None)
            self._break = None

    def begin_data_wait(self) -> None:
        """Note that the loop starts to wait for data, as at the start of an epoch."""
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
        """Count the batches of a step: of each, its statistics, and the images that are encoded and connected."""
        if self._run_start is None or not batches:
            return
        self.interval.add(StepCounts(steps=1, batches=len(batches)))
        for stats, encoded, connected in batches:
            self.interval_stats += stats
            self.interval.add(StepCounts(encoded=encoded, connected=connected))

    def stop(self, *, wait_for_device: bool = False) -> None:
        """Stop the clock until the next step; with `wait_for_device`, once the device is idle."""
        if self._run_start is not None:
            if wait_for_device:
                self._synchronize_device()
            self.interval.seconds += time.perf_counter() - self._run_start
            self._run_start = self._wait_start = None

    def _synchronize_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- the numbers ----------------------------------------------------------------------------------------------

    def gather_metrics(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the metrics of the steps since the last call, over all ranks; every rank has to call it.

        Args:
            gather: `(1, N)` of this rank -> `(ranks, N)` of all.
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
        self.total_counts.add(counts)
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
            if self.peak is not None:
                metrics["mfu"] = metrics["tflops_per_second"] / self.peak.tflops
        return {**metrics, "peak_memory_gib": self.memory}

    def finish(self, gather: Callable[[Tensor], Tensor], last_step: int) -> None:
        """Stop the clock at the end of a call and write the summary; see `gather_metrics` and `write_summary`."""
        self.end_break()
        self.stop(wait_for_device=True)
        self.gather_metrics(gather)
        self.write_summary(last_step)

    def write_summary(self, last_step: int) -> None:
        """Write the metrics of the whole call to the log and `speed.json`.

        Args:
            last_step: the number of the last update.
        """
        metrics = self._compute_metrics(self.total_stats, self.total_counts)
        if self.folder is None:
            return
        if not metrics:
            log.info("Speed: not measured, since the first step is left out and there is no other")
            return
        steps = round(self.total_counts.steps)
        seconds = self.total_counts.seconds / self.num_ranks
        metrics["seconds_per_step"] = seconds / steps
        title = f"steps {last_step - steps + 1} to {last_step} ({seconds:.1f} s; the first step is left out)"
        log.info("Speed of %s:\n\n%s\n", title, speed_table(metrics))
        if self.note is not None:
            log.info("Operations were not counted: %s", self.note)
        summary = {
            "first_step": last_step - steps + 1,
            "last_step": last_step,
            "seconds": seconds,
            "ranks": self.num_ranks,
            "device": device_name(self.device),
            **metrics,
            "whole": {**asdict(self.total_stats), **asdict(self.total_counts)},
            "flops": self.flops and asdict(self.flops),
            "flops_note": self.note,
            "peak": self.peak and asdict(self.peak),
        }
        self.folder.joinpath(SPEED_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def speed_table(metrics: dict[str, float]) -> str:
    """Return metrics as a table, in the order of `METRIC_LABELS`."""
    rows = [(label, format(metrics[name], spec)) for name, (label, spec) in METRIC_LABELS.items() if name in metrics]
    return tabulate(rows, tablefmt="plain", colalign=("left", "right"), disable_numparse=True)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated on a GPU, else resident in this process without data workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**30 if sys.platform == "darwin" else used / 2**20


def device_name(device: torch.device) -> str:
    """Return the name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
