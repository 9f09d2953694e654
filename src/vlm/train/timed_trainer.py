"""A `Trainer` that tells how fast it is, in each log and at its end."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from vlm.assembly.checkpoint import is_composed_model
from vlm.data.batching.stats import BATCH_STATS, BatchStats, num_encoded_and_connected
from vlm.data.dataset import dummy_image
from vlm.train.monitor.flops import FlopsNotCountable, count_flops
from vlm.train.monitor.peak_flops import get_peak_tflops
from vlm.train.monitor.speed import BETWEEN_STEPS, SpeedMeter

log = logging.getLogger(__name__)

DROPPED_METRICS = ("train_samples_per_second", "train_steps_per_second", "total_flos")
"""What `Trainer` says at the end: evaluation and saving in the time, and operations guessed from the parameters."""


class TimedTrainer(Trainer):
    """Measures its steps; every rank makes the same calls.

    Args:
        meter: measures; None: a meter that knows no operations.
        kwargs: as `Trainer`.
    """

    accelerator: Any

    objective: Any
    def __init__(self, *, meter: SpeedMeter | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.meter = meter or SpeedMeter(self.args.device)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As usual; what it takes until the first batch is there is time of waiting."""
        self.meter.begin_data_wait()
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As usual, with a look at the clock and at what the batches say of themselves."""
        self.meter.begin_step()
        batches, number = super().get_batch_samples(self.meter.time_waits(epoch_iterator), num_batches, device)
        facts = [batch.get(BATCH_STATS) or BatchStats(samples=len(batch[self.objective.row_key])) for batch in batches]
        each = self._repeats_equal_images()
        self.meter.add(
            [
                (one, *num_encoded_and_connected(batch, one.images, *each))
                for one, batch in zip(facts, batches, strict=True)
            ]
        )
        return batches, number

    def _repeats_equal_images(self) -> tuple[bool, bool]:
        """Whether equal images are encoded, and connected, one by one."""
        if not is_composed_model(self.model):
            return True, True
        self.model.train()  # as the steps will have it
        return self.model.encodes_duplicates(), self.model.connects_duplicates()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As usual; the clock stands still meanwhile."""
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.meter.stop(wait_for_device=True)
        with torch.profiler.record_function(BETWEEN_STEPS):
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As usual, with the speed since the last log beside a training loss, and all of it at the end."""
        if "loss" in logs:
            logs |= self.meter.gather_metrics(self.accelerator.gather)
        elif "train_runtime" in logs:
            self.meter.stop(wait_for_device=True)
            self.meter.gather_metrics(self.accelerator.gather)
            self.meter.write_summary(self.state.global_step)
            for name in DROPPED_METRICS:
                logs.pop(name, None)
        super().log(logs)  # without the start, from which `Trainer` would tell a second number of tokens a second

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: they are counted elsewhere, and by more than the number of parameters."""
        return 0


def make_speed_meter(
    model: Any, processor: Any, args: TrainingArguments, dtype: torch.dtype, peak_tflops: float | None, folder: Path
) -> SpeedMeter:
    """A meter for a model that is ready to train; the first rank's knows its operations and writes what was measured.

    Args:
        model: the model, with its adapters, of which some is frozen.
        processor: its processor.
        args: the run's.
        dtype: what matrix products run in.
        peak_tflops: `trainer.peak_tflops`.
        folder: the run directory.
    """
    if args.process_index > 0:
        return SpeedMeter(args.device)
    try:
        flops = count_flops(model, dummy_image(processor)[1])
    except FlopsNotCountable as reason:
        log.info("Operations of this model are not counted, so the log has no mfu: %s", reason)
        return SpeedMeter(args.device, note=str(reason), folder=folder)
    peak = get_peak_tflops(args.device, dtype, peak_tflops)
    log.info("Model FLOPs utilisation is a share of %.3g TFLOP/s (%s)", peak.tflops, peak.source)
    return SpeedMeter(args.device, flops, peak, folder=folder)
