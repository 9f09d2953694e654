"""What counting operations predicts of two ways to train on the same samples.

Ours needs what `vlm.train.monitor.flops` counts: each sample's own tokens and pairs of tokens, the vocabulary at
supervised positions, the encoder up to the layer that is read. A padded batch takes every position through the language model and
the vocabulary, every pair of positions of a row (its mask hides pairs, it spares none), and all layers of the encoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from benchmarks.lengths import Record
from benchmarks.shapes import Shape
from benchmarks.variants import Sample
from vlm.data.batching.stats import BatchStats, compute_batch_stats
from vlm.train.monitor.flops import StepFlops, count_flops

NEWLINE = 1
"""The token between an image and the question."""


def count_operations(model: Any, shape: Shape) -> tuple[StepFlops, float]:
    """Operations of our model as it trains, and those of all layers of its encoder for one image."""
    return count_flops(model, {"pixel_values": torch.empty(1, 3, shape.side, shape.side)}), count_whole_encoder(shape)


def count_whole_encoder(shape: Shape) -> float:
    """Operations of a forward pass through all layers of the encoder, an image."""
    with torch.device("meta"):
        encoder = AutoModel.from_config(shape.vision_config(), attn_implementation="eager")
        pixels: Tensor = torch.empty(1, 3, shape.side, shape.side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pixels)
    return counter.get_total_flops()


def facts(samples: Sequence[Sample]) -> BatchStats:
    """What samples hold."""
    return compute_batch_stats(samples, sum(len(sample["input_ids"]) for sample in samples))


def ours(flops: StepFlops, samples: Sequence[Sample], batches: int = 1) -> float:
    """Operations of a step of ours, of so many packs."""
    held = facts(samples)
    return flops.total(held, held.images, held.images, batches)


def padded(flops: StepFlops, encoder: float, micro_batches: Sequence[Sequence[Sample]]) -> float:
    """Operations of a step of padded micro-batches."""
    total = 0.0
    for samples in micro_batches:
        longest = max(len(sample["input_ids"]) for sample in samples)
        positions = len(samples) * longest
        images = facts(samples).images
        total += (flops.token + flops.supervised) * positions + flops.pair * positions * longest
        total += (encoder + flops.connected) * images + flops.batch
    return total


def make_blank_samples(records: Sequence[Record], shape: Shape) -> list[Sample]:
    """Samples as long as records of the mixture, of which only the numbers matter."""
    pixels = torch.empty(1, 3, 1, 1)
    made = []
    for record in records:
        length = record.tokens + (shape.tokens_per_image + NEWLINE) * record.source.picture
        labels = [-100] * (length - record.supervised) + [0] * record.supervised
        made.append(
            {"input_ids": [0] * length, "labels": labels} | ({"pixel_values": pixels} if record.source.picture else {})
        )
    return made


def predict_ratio(
    flops: StepFlops, encoder: float, samples: Sequence[Sample], per_micro_batch: int, micro_batches: int = 1
) -> float:
    """The ratio that counting predicts over the whole mixture: padded operations over ours.

    Args:
        flops: of our model.
        encoder: see `count_whole_encoder`.
        samples: many, as drawn.
        per_micro_batch: samples of a micro-batch.
        micro_batches: over so many, a step's samples are sorted by length; 1: they are not.
    """
    step = per_micro_batch * micro_batches
    steps = [samples[start : start + step] for start in range(0, len(samples) - step + 1, step)]
    theirs = 0.0
    for one in steps:
        order = sorted(one, key=lambda sample: len(sample["input_ids"]))
        places = range(0, step, per_micro_batch)
        theirs += padded(flops, encoder, [order[place : place + per_micro_batch] for place in places])
    return theirs / sum(ours(flops, one) for one in steps)


def operation_shares(flops: StepFlops, samples: Sequence[Sample]) -> dict[str, float]:
    """What each part of a step of ours costs, as a share of it."""
    held = facts(samples)
    pairs = (held.squared_lengths + held.tokens) / 2
    parts = {
        "language model": flops.token * held.tokens,
        "attention": flops.pair * pairs,
        "vocabulary": flops.supervised * held.supervised,
        "encoder": flops.encoded * held.images,
        "connector": flops.connected * held.images,
    }
    return {name: cost / sum(parts.values()) for name, cost in parts.items()}
