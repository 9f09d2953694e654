"""Predicts from counted operations how much faster one way to train on the same samples is than another.

Ours needs what `vlm.train.monitor.flops` counts: each sample's own tokens and pairs of tokens, the vocabulary at
supervised positions, and the encoder up to the selected layer. A padded batch takes every position through the language
model and the vocabulary, every pair of positions of a row (the mask hides pairs but saves none), and all layers of the
encoder.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from benchmarks.lengths import Record
from benchmarks.shapes import Shape
from benchmarks.variants import SEED, Sample
from vlm.data.batching.best_fit import pack_lengths
from vlm.data.batching.stats import BatchStats, compute_batch_stats
from vlm.train.monitor.flops import StepFlops, count_flops

NEWLINE = 1
"""The token between an image and the question."""


def count_operations(model: Any, shape: Shape) -> tuple[StepFlops, float]:
    """Return the operations of our model in training, and those of all layers of its encoder for one image."""
    return count_flops(model, {"pixel_values": torch.empty(1, 3, shape.side, shape.side)}), count_whole_encoder(shape)


def count_whole_encoder(shape: Shape) -> float:
    """Return the operations of a forward pass of one image through all layers of the encoder."""
    with torch.device("meta"):
        encoder = AutoModel.from_config(shape.vision_config(), attn_implementation="eager")
        pixels: Tensor = torch.empty(1, 3, shape.side, shape.side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pixels)
    return counter.get_total_flops()


def sample_stats(samples: Sequence[Sample]) -> BatchStats:
    """Return the numbers of tokens and images of samples."""
    return compute_batch_stats(samples, sum(len(sample["input_ids"]) for sample in samples))


def ours(flops: StepFlops, samples: Sequence[Sample], batches: int = 1) -> float:
    """Return the operations of our step of `batches` packs."""
    stats = sample_stats(samples)
    return flops.total(stats, stats.images, stats.images, batches)


def padded(flops: StepFlops, encoder: float, micro_batches: Sequence[Sequence[Sample]]) -> float:
    """Return the operations of a step of padded micro-batches."""
    total = 0.0
    for samples in micro_batches:
        longest = max(len(sample["input_ids"]) for sample in samples)
        positions = len(samples) * longest
        images = sample_stats(samples).images
        total += (flops.token + flops.supervised) * positions + flops.pair * positions * longest
        total += (encoder + flops.connected) * images + flops.batch
    return total


def make_blank_samples(records: Sequence[Record], shape: Shape) -> list[Sample]:
    """Return samples as long as records of the mixture; their ids and pixels are meaningless."""
    pixels = torch.empty(1, 3, 1, 1)
    samples = []
    for record in records:
        length = record.tokens + (shape.tokens_per_image + NEWLINE) * record.source.has_image
        labels = [-100] * (length - record.supervised) + [0] * record.supervised
        sample: Sample = {"input_ids": [0] * length, "labels": labels}
        samples.append(sample | ({"pixel_values": pixels} if record.source.has_image else {}))
    return samples


def predict_ratio(
    flops: StepFlops, encoder: float, samples: Sequence[Sample], per_micro_batch: int, micro_batches: int = 1
) -> float:
    """Return the predicted ratio over the whole mixture: padded operations over ours.

    Args:
        flops: operations of our model.
        encoder: operations of its encoder, see `count_whole_encoder`.
        samples: many samples, as drawn.
        per_micro_batch: number of samples in a micro-batch.
        micro_batches: number of micro-batches over which samples are sorted by length; 1: not sorted.
    """
    step = per_micro_batch * micro_batches
    steps = [samples[start : start + step] for start in range(0, len(samples) - step + 1, step)]
    theirs = 0.0
    for step_samples in steps:
        order = sorted(step_samples, key=lambda sample: len(sample["input_ids"]))
        starts = range(0, step, per_micro_batch)
        theirs += padded(flops, encoder, [order[start : start + per_micro_batch] for start in starts])
    return theirs / sum(ours(flops, step_samples) for step_samples in steps)


def operation_shares(flops: StepFlops, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the share of each part in the operations of our step."""
    stats = sample_stats(samples)
    pairs = (stats.squared_lengths + stats.tokens) / 2
    parts = {
        "language model": flops.token * stats.tokens,
        "attention": flops.pair * pairs,
        "vocabulary": flops.supervised * stats.supervised,
        "encoder": flops.encoded * stats.images,
        "connector": flops.connected * stats.images,
    }
    return {name: cost / sum(parts.values()) for name, cost in parts.items()}


def select_records(records: Sequence[Record], shape: Shape, capacity: int, packs: int) -> list[Record]:
    """Return as many of the first records as fit into `packs` packs."""
    lengths = [len(sample["input_ids"]) for sample in make_blank_samples(records, shape)]
    number = int(np.searchsorted(np.cumsum(lengths), packs * capacity, side="right"))
    while len(pack_lengths(lengths[:number], capacity, SEED)) > packs:
        number -= 1
    return list(records[:number])
