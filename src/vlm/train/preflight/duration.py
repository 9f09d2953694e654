"""The time and the disk of a run, from the steps of a probe."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from transformers import TrainingArguments

from vlm.checks.disk import free_bytes, nearest_folder
from vlm.config.choices import GROUPED_STRATEGIES
from vlm.config.schema import RunConfig
from vlm.data.batching.stats import BatchStats
from vlm.data.dataset import SampleDataset
from vlm.train.preflight.answering import num_answers
from vlm.train.preflight.fake_step import BatchShape
from vlm.train.preflight.findings import DiskFindings, TimeFindings
from vlm.train.preflight.memory import MemoryPrediction, ModelSizes
from vlm.train.preflight.probe import Probe
from vlm.train.preflight.step_time import DRIFT, fit_step_time

WRITTEN_BYTES = 32 << 20
"""Bytes that are written to find out how fast the disk is."""
NUM_DRAWN = 2000
"""Batches that are drawn to find out how much padding a mean one has."""
MEAN_BASIS = "nothing"
"""What a step's time grows with where the sizes of steps are not known."""
FORWARD_SHARE = 0.4
"""Time of a forward pass as a share of a step's, where the probe could not time one."""


def predict_time(
    probe: Probe, config: RunConfig, args: TrainingArguments, train: object, evaluation: object, disk: DiskFindings
) -> TimeFindings | None:
    """Return the time of a run; None if no step was timed.

    A step's time is taken to grow with its counted operations, else with its tokens, else with nothing.
    """
    if not probe.seconds:
        return None
    steps, strategy = probe.max_steps, str(config.trainer.train_sampling_strategy)
    sizes = StepSizes(probe, max(args.world_size, 1), strategy)
    samples = samples_of_step(probe, args, train)
    timed, size = sizes.timed, sizes.of_samples(train, samples)
    if size is None:
        timed, size, sizes.basis = [1.0] * len(probe.seconds), 1.0, MEAN_BASIS
    step = fit_step_time(timed, probe.seconds, size, steps)
    evaluations = number_of_times(args.eval_strategy, args.eval_steps, steps, args) + bool(args.eval_on_start)
    answers = num_answers(config, evaluation, evaluations, ends_with_one=evaluates_last(args, steps))
    checkpoints = number_of_times(args.save_strategy, args.save_steps, steps, args)
    once = evaluation_seconds(probe, evaluation, sizes, step.mean / size, step.mean / max(samples, 1))
    speed = disk_speed(Path(config.trainer.output_dir or "outputs")) if checkpoints or disk.final else 1.0
    margin = None if step.margin is None else math.hypot(step.margin, DRIFT * step.mean)
    on_cpu = bool(probe.cpu_seconds) and args.device.type == "cpu"
    return TimeFindings(
        steps=steps,
        step=step.mean,
        margin=margin,
        timed=len(probe.seconds),
        basis=sizes.basis,
        computing=sum(probe.cpu_seconds) / sum(probe.seconds) if on_cpu else None,
        loading=probe.loading_seconds,
        evaluation=once * evaluations,
        evaluations=evaluations,
        answering=probe.answer_seconds * answers,
        answers=answers if probe.answer_seconds else 0,
        saving=(checkpoints * disk.checkpoint + disk.final) / speed,
        checkpoints=checkpoints,
        drawing=probe.drawing_seconds * (evaluations + checkpoints + 1),
    )


def samples_of_step(probe: Probe, args: TrainingArguments, train: object) -> float:
    """Return the number of samples of a mean step on all ranks: the last step of an epoch may have fewer."""
    if not isinstance(train, SampleDataset) or not len(train):
        return probe.batch_samples
    if args.max_steps <= 0:
        return len(train) * args.num_train_epochs / max(probe.max_steps, 1)
    return min(probe.batch_samples, len(train))


def evaluation_seconds(
    probe: Probe, evaluation: object, sizes: "StepSizes", per_size: float, per_sample: float
) -> float:
    """Return the seconds of an evaluation: a forward pass of each sample, and of each with a blank image.

    Args:
        probe: it timed a forward pass.
        evaluation: the samples; 0 seconds where there are none.
        sizes: how large samples are.
        per_size: seconds of a training step of size 1.
        per_sample: seconds of a training step for each of its samples, where sizes are not known.
    """
    if not isinstance(evaluation, SampleDataset) or not len(evaluation):
        return 0.0
    share = FORWARD_SHARE
    if probe.forward_seconds:
        batches = probe.stats[-1][3] if probe.stats else 1
        share = min(probe.forward_seconds * batches / probe.seconds[-1], 1.0)
    size = sizes.of_samples(evaluation, len(evaluation))
    passes = 2 if evaluation.num_images.any() else 1
    return (per_sample * len(evaluation) if size is None else per_size * size) * share * passes


class StepSizes:
    """How large steps are, for one rank: what their time grows with.

    Attributes:
        timed: of each timed step; empty: not known.
        basis: what is counted.
    """

    def __init__(self, probe: Probe, world_size: int, strategy: str):
        self.probe, self.world_size, self.strategy = probe, world_size, strategy
        self.steps = list(zip(probe.stats, probe.timed_shapes, strict=False))
        self.timed = [self._size(_with_padding(step[0], shapes), *step[1:]) for step, shapes in self.steps]
        self.basis = "its tokens" if probe.flops is None else "its counted operations"
        if len(self.timed) < len(probe.seconds) or not all(self.timed):
            self.timed = []

    def _size(self, stats: BatchStats, encoded: float, connected: float, batches: float) -> float:
        if self.probe.flops is None:
            return stats.tokens
        return self.probe.flops.total(stats, encoded, connected, batches)

    def of_samples(self, dataset: object, samples: float) -> float | None:
        """Return the size of so many samples of a data set, divided among the ranks; None: not known."""
        if not self.timed or not isinstance(dataset, SampleDataset) or not samples:
            return None
        probed = sum((_with_padding(step[0], shapes) for step, shapes in self.steps), BatchStats())
        encoded, connected, batches = (
            sum(numbers) for numbers in zip(*(step[1:] for step, _ in self.steps), strict=True)
        )
        mean = self._mean_stats(dataset, samples / self.world_size, probed)
        share = mean.images / probed.images if probed.images else 0.0
        per_sample = batches / max(probed.samples, 1)
        return self._size(mean, encoded * share, connected * share, per_sample * mean.samples)

    def _mean_stats(self, dataset: SampleDataset, samples: float, probed: BatchStats) -> BatchStats:
        """Return the statistics of so many samples, drawn as the run draws them, with their padding."""
        lengths = np.asarray(dataset.lengths, dtype=np.float64)
        shapes = [shape for step in self.probe.timed_shapes for shape in step]
        tokens, squares = lengths.mean() * samples, (lengths**2).mean() * samples
        if shapes and not any(shape.lengths for shape in shapes) and self.strategy not in GROUPED_STRATEGIES:
            rows = max(shape.rows for shape in shapes)
            longest = np.random.default_rng(0).choice(lengths, (NUM_DRAWN, rows)).max(axis=1)
            tokens, squares = longest.mean() * samples, (longest**2).mean() * samples
        supervised = probed.supervised * tokens / probed.tokens
        images = float(np.mean(dataset.num_images)) * samples
        return BatchStats(
            round(samples), round(tokens), round(tokens), round(supervised), round(images), round(squares)
        )


def _with_padding(stats: BatchStats, shapes: Sequence[BatchShape]) -> BatchStats:
    """Return statistics in which padding counts as tokens: it costs as much."""
    if not shapes or any(shape.lengths for shape in shapes):
        return stats
    tokens = sum(shape.rows * shape.tokens for shape in shapes)
    return replace(stats, tokens=tokens, squared_lengths=sum(shape.rows * shape.tokens**2 for shape in shapes))


def number_of_times(strategy: object, every: float | None, steps: int, args: TrainingArguments) -> int:
    """Return how often a run evaluates or saves."""
    name = getattr(strategy, "value", strategy)
    if name == "epoch":
        return max(round(args.num_train_epochs), 1)
    if name == "steps" and every:
        return steps // _interval(every, steps)
    return 0


def evaluates_last(args: TrainingArguments, steps: int) -> bool:
    """Return whether a run evaluates behind its last step."""
    if getattr(args.eval_strategy, "value", args.eval_strategy) == "epoch":
        return True
    return bool(number_of_times(args.eval_strategy, args.eval_steps, steps, args)) and (
        steps % _interval(cast(float, args.eval_steps), steps) == 0
    )


def _interval(every: float, steps: int) -> int:
    """Return a number of steps that may be given as a share of all."""
    return max(math.ceil(every if every >= 1 else every * steps), 1)


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
