"""The memory of a run's step: predicted, measured in the probe, and what each way of sharding makes of it."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from vlm.config.schema import RunConfig
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import SampleDataset
from vlm.data.processor import Processor
from vlm.train.distributed import all_gather_objects
from vlm.train.model import compute_dtype
from vlm.train.objectives.base import Objective, PreparedRun
from vlm.train.preflight.available import available_bytes, ranks_here
from vlm.train.preflight.fake_step import BatchShape, MemoryNotCountable
from vlm.train.preflight.findings import MemoryFindings, ShardedRow
from vlm.train.preflight.memory import FULL, MemoryPrediction, ModelSizes, predict_memory
from vlm.train.preflight.paper import prepare_on_paper
from vlm.train.preflight.probe import Probe
from vlm.train.preflight.sharded import SHARDINGS, ShardedMemory, predict_sharded, sharding_of

DEVICES = (1, 2, 8)
"""Numbers of devices that the memory of sharding is told for, beside the run's own."""


def inspect_memory(
    objective: Objective,
    run: PreparedRun,
    config: RunConfig,
    resolved: tuple[PreTrainedConfig, Processor],
    probe: Probe,
    sizes: ModelSizes,
) -> MemoryFindings:
    """Return the memory of the probe's step and of the worst one, with what sharding makes of it.

    Every rank calls it.
    """
    args = run.args
    dtype, device, ranks = compute_dtype(args), args.device, max(args.world_size, 1)
    way, half = sharding_of(config.trainer), dtype != torch.float32
    available = available_bytes(device, ranks_here(ranks))
    note, predicted, worst = "", None, None
    try:
        model, own = _countable(objective, run, resolved, way)
        image = dummy_image(run.processor)[1]
        predicted = predict_memory(objective, model, config, own, image, probe.shapes, dtype)
        shape = worst_batch(run.data.records["train"], probe.shapes)
        worst = predicted if shape is None else predict_memory(objective, model, config, own, image, [shape] * 2, dtype)
    except MemoryNotCountable as reason:
        note = str(reason)

    def on_each(found: MemoryPrediction) -> ShardedMemory:
        """Return the memory of a rank, as the run shards it."""
        return predict_sharded(found, sizes, ranks, half=half, own=config.trainer)[way]

    def bytes_of(memory: ShardedMemory) -> int:
        """Return the bytes of a rank; what is offloaded from a CPU stays there."""
        return memory.device + (memory.host if device.type == "cpu" else 0)

    expected = None if predicted is None else on_each(predicted)
    highest = max(all_gather_objects(probe.peak))
    base = worst or predicted or (measured_prediction(highest, probe, sizes) if way == "none" else None)
    return MemoryFindings(
        predicted, probe.peak, highest, worst, _rows(base, sizes, ranks, config, half=half), available,
        "allocated by PyTorch" if device.type == "cuda" else "tensors alive at once, counted by PyTorch",
        note, way, ranks, expected, expected_bytes=0 if expected is None else bytes_of(expected),
        needed=highest if worst is None else max(bytes_of(on_each(worst)), highest), held=probe.held,
    )  # fmt: skip


def _countable(
    objective: Objective, run: PreparedRun, resolved: tuple[PreTrainedConfig, Processor], way: str
) -> tuple[PreTrainedModel, TrainingArguments]:
    """Return a model that is not sharded, with arguments: the run's own, or one without weights."""
    if way == "none":
        return run.model, run.args
    model, _, args, _ = prepare_on_paper(objective, *resolved)
    return model, args


def _rows(
    base: MemoryPrediction | None, sizes: ModelSizes, ranks: int, config: RunConfig, *, half: bool
) -> list[ShardedRow]:
    rows: dict[str, ShardedRow] = {}
    if base is None:
        return []
    for devices in sorted({*DEVICES, ranks}):
        for name, memory in predict_sharded(base, sizes, devices, half=half, own=config.trainer).items():
            row = rows.setdefault(name, ShardedRow(name, SHARDINGS[name], {}, {}))
            row.device[devices], row.host[devices] = memory.device, memory.host
    return [rows[way] for way in SHARDINGS if way in rows]


def measured_prediction(peak: int, probe: Probe, sizes: ModelSizes) -> MemoryPrediction:
    """Return what a measured peak says where activations cannot be counted."""
    gradients, states = FULL * sizes.trained, probe.held.get("optimiser states", 2 * FULL * sizes.trained)
    activations = max(peak - sizes.weights - gradients - states, 0)
    return MemoryPrediction(sizes.weights, gradients, states, activations, peak, "measured in the probe")


def worst_batch(train: object, shapes: Sequence[BatchShape]) -> BatchShape | None:
    """Return a batch of the longest samples of a run, as many as the largest batch of the probe has; None: unknown."""
    if not isinstance(train, SampleDataset) or not shapes or not len(train.lengths):
        return None
    largest = max(shapes, key=lambda shape: shape.rows * shape.tokens)
    number = len(largest.lengths) or largest.rows
    lengths = sorted(train.lengths.tolist(), reverse=True)[:number]
    grown = sum(lengths) / max(sum(largest.lengths) or largest.rows * largest.tokens, 1)
    images = sorted(train.num_images.tolist(), reverse=True)[:number]
    supervised = max(round(largest.supervised * max(grown, 1)), largest.supervised)
    count = max(largest.images, sum(images))
    if largest.lengths:
        return BatchShape(1, sum(lengths), count, supervised, tuple(lengths))
    return BatchShape(len(lengths), max(lengths), count, supervised)
