"""The time and the disk of a run, from the steps of a probe."""

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import TrainingArguments

from vlm.checks.disk import free_bytes, nearest_folder
from vlm.config.choices import GROUPED_STRATEGIES
from vlm.config.schema import RunConfig
from vlm.data.batching.stats import BatchStats
from vlm.data.dataset import SampleDataset
from vlm.train.preflight.fake_step import BatchShape
from vlm.train.preflight.findings import DiskFindings, TimeFindings
from vlm.train.preflight.memory import MemoryPrediction, ModelSizes
from vlm.train.preflight.probe import Probe

WRITTEN_BYTES = 32 << 20
"""Bytes that are written to find out how fast the disk is."""
NUM_DRAWN = 2000
"""Batches that are drawn to find out how much padding a mean one has."""


def predict_time(
    probe: Probe, config: RunConfig, args: TrainingArguments, train: object, evaluation: object, disk: DiskFindings
) -> TimeFindings | None:
    """Return the time of a run; None where no step was timed.

    A step's time is taken to grow with its counted operations, else with its tokens, else with nothing.
    """
    if not probe.seconds:
        return None
    steps = probe.max_steps
    mean, basis = _mean_step(probe, train, str(config.trainer.train_sampling_strategy))
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


def _mean_step(probe: Probe, train: object, strategy: str = "random") -> tuple[float, str]:
    """Return the seconds of a mean step of the run, and what they are taken to grow with."""
    seconds = statistics.mean(probe.seconds)
    if not isinstance(train, SampleDataset) or not probe.batch_samples:
        return seconds, "the steps of the probe"
    steps = probe.stats[: len(probe.seconds)]
    padded = zip(steps, probe.timed_shapes, strict=True)
    probed = sum((_with_padding(step[0], shapes) for step, shapes in padded), BatchStats())
    if not probed.tokens:
        return seconds, "the steps of the probe"
    mean = _mean_stats(probe, train, probed, strategy)
    if probe.flops is None:
        return seconds * len(steps) * mean.tokens / probed.tokens, "its tokens"
    encoded, connected, batches = (sum(numbers) for numbers in zip(*(step[1:] for step in steps), strict=True))
    share = mean.images / probed.images if probed.images else 0.0
    run = probe.flops.total(mean, encoded * share, connected * share, batches / len(steps))
    done = probe.flops.total(probed, encoded, connected, batches)
    return sum(probe.seconds) * run / done, "its counted operations"


def _with_padding(stats: BatchStats, shapes: Sequence[BatchShape]) -> BatchStats:
    """Return statistics in which padding counts as tokens: it costs as much."""
    if not shapes or any(shape.lengths for shape in shapes):
        return stats
    tokens = sum(shape.rows * shape.tokens for shape in shapes)
    return replace(stats, tokens=tokens, squared_lengths=sum(shape.rows * shape.tokens**2 for shape in shapes))


def _mean_stats(probe: Probe, train: SampleDataset, probed: BatchStats, strategy: str) -> BatchStats:
    """Return the statistics of a mean step: samples drawn as the run draws them, with their padding."""
    lengths = np.asarray(train.lengths, dtype=np.float64)
    samples = min(probe.batch_samples, len(lengths))
    shapes = [shape for step in probe.timed_shapes for shape in step]
    tokens, squares = lengths.mean() * samples, (lengths**2).mean() * samples
    if shapes and not any(shape.lengths for shape in shapes) and strategy not in GROUPED_STRATEGIES:
        rows = max(shape.rows for shape in shapes)
        longest = np.random.default_rng(0).choice(lengths, (NUM_DRAWN, rows)).max(axis=1)
        tokens, squares = longest.mean() * samples, (longest**2).mean() * samples
    supervised = probed.supervised * tokens / probed.tokens
    images = float(np.mean(train.num_images)) * samples
    return BatchStats(samples, round(tokens), round(tokens), round(supervised), round(images), round(squares))


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
