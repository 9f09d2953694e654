"""The time and the disk of a run, from the steps of a probe."""

import math
import os
import statistics
import time
from pathlib import Path

import numpy as np
from transformers import TrainingArguments

from vlm.checks.disk import free_bytes, nearest_folder
from vlm.config.schema import RunConfig
from vlm.data.batching.stats import BatchStats
from vlm.data.dataset import SampleDataset
from vlm.train.preflight.findings import DiskFindings, TimeFindings
from vlm.train.preflight.memory import MemoryPrediction, ModelSizes
from vlm.train.preflight.probe import Probe

WRITTEN_BYTES = 32 << 20
"""Bytes that are written to find out how fast the disk is."""


def predict_time(
    probe: Probe, config: RunConfig, args: TrainingArguments, train: object, evaluation: object, disk: DiskFindings
) -> TimeFindings | None:
    """Return the time of a run; None where no step was timed.

    A step's time is taken to grow with its counted operations, else with its tokens, else with nothing.
    """
    if not probe.seconds:
        return None
    steps = probe.max_steps
    mean, basis = _mean_step(probe, train)
    per_sample = mean / max(probe.batch_samples, 1)
    evaluations = number_of_times(args.eval_strategy, args.eval_steps, steps, args)
    checkpoints = number_of_times(args.save_strategy, args.save_steps, steps, args)
    share = min(probe.forward_seconds / statistics.median(probe.seconds), 1.0) if probe.forward_seconds else 0.4
    samples = len(evaluation) if isinstance(evaluation, SampleDataset) else 0
    passes = 2 if samples and evaluation.num_images.any() else 1  # pyright: ignore[reportAttributeAccessIssue]
    once = samples * per_sample * share * passes
    speed = disk_speed(Path(config.trainer.output_dir or "outputs")) if checkpoints or disk.final else 1.0
    saving = (checkpoints * disk.checkpoint + disk.final) / speed
    return TimeFindings(steps, mean, mean * steps, once * evaluations, saving, basis, evaluations, checkpoints)


def _mean_step(probe: Probe, train: object) -> tuple[float, str]:
    """Return the seconds of a mean step of the run, and what they are taken to grow with."""
    seconds = statistics.median(probe.seconds)
    if not isinstance(train, SampleDataset) or not probe.stats or not probe.batch_samples:
        return seconds, "the steps of the probe"
    probed, encoded, connected, batches = probe.stats[-1]
    lengths = np.asarray(train.lengths, dtype=np.float64)
    if not probed.tokens or not lengths.sum():
        return seconds, "the steps of the probe"
    samples = min(probe.batch_samples, len(lengths))
    tokens, squares = lengths.mean() * samples, (lengths**2).mean() * samples
    ratio = tokens / probed.tokens
    if probe.flops is None:
        return seconds * ratio, "its tokens"
    images = float(np.mean(train.num_images)) * samples
    images_ratio = images / probed.images if probed.images else 0.0
    stats = BatchStats(
        samples, round(tokens), round(tokens), round(probed.supervised * ratio), round(images), round(squares)
    )
    run = probe.flops.total(stats, encoded * images_ratio, connected * images_ratio, batches)
    return seconds * run / probe.flops.total(probed, encoded, connected, batches), "its counted operations"


def number_of_times(strategy: object, every: float | None, steps: int, args: TrainingArguments) -> int:
    """Return how often a run evaluates or saves."""
    name = getattr(strategy, "value", strategy)
    if name == "epoch":
        return max(round(args.num_train_epochs), 1)
    if name == "steps" and every:
        return steps // max(math.ceil(every if every >= 1 else every * steps), 1)
    return 0


def disk_speed(folder: Path) -> float:
    """Return the bytes a second that can be written to the disk that a folder lies on."""
    file = nearest_folder(folder) / f".vlm-preflight-{os.getpid()}"
    content = os.urandom(1 << 20)
    begun = time.perf_counter()
    try:
        with file.open("wb") as opened:
            for _ in range(WRITTEN_BYTES >> 20):
                opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError:
        return float(WRITTEN_BYTES)
    finally:
        file.unlink(missing_ok=True)
    return WRITTEN_BYTES / max(time.perf_counter() - begun, 1e-3)


def predict_disk(
    config: RunConfig, args: TrainingArguments, sizes: ModelSizes, memory: MemoryPrediction | None
) -> DiskFindings:
    """Return the disk that the checkpoints of a run need: those that are kept, one that is being written, and `final`.

    A checkpoint has what trains and the states of the optimiser, `final` the whole model.
    """
    states = memory.states if memory is not None else 8 * sizes.trained
    checkpoint = 0 if args.save_strategy == "no" else 4 * sizes.trained + states
    limit = config.trainer.save_total_limit
    kept = 1 + (limit if limit is not None else 2)
    best = sizes.weights if config.trainer.keep_best else 0
    needed = kept * checkpoint + best + sizes.weights
    return DiskFindings(checkpoint, sizes.weights, needed, free_bytes(Path(config.trainer.output_dir or "outputs")))
