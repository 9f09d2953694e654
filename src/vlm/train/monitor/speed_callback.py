"""The clock of a run, and the meter that it belongs to."""

import logging
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.assembly.checkpoint import is_composed_model
from vlm.data.batching.stats import BatchStats, num_encoded_and_connected
from vlm.data.dataset import dummy_image
from vlm.data.processor import Processor
from vlm.train.model import compute_dtype
from vlm.train.monitor.flops import FlopsNotCountable, count_flops
from vlm.train.monitor.peak_flops import get_peak_tflops
from vlm.train.monitor.speed import SpeedMeter

log = logging.getLogger(__name__)


class SpeedCallback(TrainerCallback):
    """Stops the clock while a run logs, evaluates or saves. It has to be the last callback, since others ask for that.

    Args:
        meter: the clock; `VLMTrainer` starts it where a step begins.
    """

    def __init__(self, meter: SpeedMeter):
        self.meter = meter

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Count the time until the first batch is there as waiting for data."""
        self.meter.end_break()
        self.meter.begin_data_wait()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Stop the clock where something else comes between two steps."""
        if control.should_log or control.should_evaluate or control.should_save:
            self.meter.stop(wait_for_device=True)
        self.meter.begin_break()

    on_epoch_end = on_step_end


def count_images(model: PreTrainedModel, batch: Mapping[str, object], stats: BatchStats) -> tuple[int, int]:
    """Return how many images of a batch the visual encoder reads, and the connector."""
    encodes_duplicates = connects_duplicates = True
    if is_composed_model(model):
        model.train()  # as the steps will have it
        encodes_duplicates, connects_duplicates = model.encodes_duplicates(), model.connects_duplicates()
    return num_encoded_and_connected(batch, stats.images, encodes_duplicates, connects_duplicates)


def make_speed_meter(
    model: PreTrainedModel, processor: Processor, args: TrainingArguments, peak_tflops: float | None, folder: Path
) -> SpeedMeter:
    """Return a meter for a model that is ready to train; the first rank's knows its operations and writes a summary.

    Args:
        model: the model with its adapters, its frozen parameters frozen.
        processor: the model's processor.
        args: the run's arguments.
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
    peak = get_peak_tflops(args.device, compute_dtype(args), peak_tflops)
    log.info("Model FLOPs utilisation is a share of %.3g TFLOP/s (%s)", peak.tflops, peak.source)
    return SpeedMeter(args.device, flops, peak, folder=folder)
