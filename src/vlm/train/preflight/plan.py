"""`vlm check --plan GPUS=8xH100`: what fits and how long a run takes on GPUs that are not here, without weights.

Memory is counted on the model without numbers (`fake_step.py`), operations by `monitor/flops.py`; time follows from the
peak of the GPU's data sheet and a share of it that is assumed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from vlm.assembly.resolve import resolve_model
from vlm.checks.disk import format_bytes
from vlm.checks.start import start_problem
from vlm.config.derived import embedding_row_keys
from vlm.config.schema import RunConfig
from vlm.data.batching.stats import BatchStats
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import SampleDataset
from vlm.data.processor import Processor
from vlm.train.arguments import training_arguments
from vlm.train.monitor.flops import FlopsNotCountable, count_flops
from vlm.train.monitor.peak_flops import data_sheet_tflops
from vlm.train.objectives.base import Objective
from vlm.train.objectives.table import make_objective
from vlm.train.parts import table
from vlm.train.preflight.fake_step import BatchShape, MemoryNotCountable
from vlm.train.preflight.memory import ModelSizes, predict_memory
from vlm.train.preflight.paper import paper_config, prepare_on_paper
from vlm.train.preflight.report import format_duration
from vlm.train.preflight.sharded import SHARDINGS, predict_sharded

MEMORY_GB = {
    "GB200": 186, "B200": 180, "B100": 192, "H200 NVL": 141, "H200": 141, "H100 NVL": 94, "H100": 80, "H800": 80,
    "H20": 96, "GH200": 96, "A100 40GB": 40, "A100": 80, "A800": 80, "A40": 48, "A30": 24, "A10G": 24, "A10": 24,
    "L40S": 48, "L40": 48, "L4": 24, "RTX 6000 ADA": 48, "RTX A6000": 48, "RTX 5090": 32, "RTX 4090": 24,
    "RTX 3090": 24, "MI300X": 192, "MI325X": 256, "MI250X": 64,
}  # fmt: skip
"""Name of a GPU, as in `DATA_SHEET_TFLOPS` -> 10^9 bytes of its memory."""
USABLE = 0.92
"""Share of a GPU's memory that a step may take: the rest is CUDA's, and lost between allocations."""
ASSUMED_MFU = 0.4
"""Share of the peak that runs of this kind are assumed to reach, where `--mfu` says nothing."""
RECOMPUTED = 4 / 3
"""Operations of a step with activation checkpointing, as a multiple of those without."""


@dataclass(frozen=True)
class Devices:
    """Some GPUs of one kind; `memory` is in bytes."""

    number: int
    name: str
    memory: int
    tflops: float

    @classmethod
    def parse(cls, text: str) -> "Devices":
        """Read `GPUS=8xH100` or `8xH100`.

        Raises:
            ValueError: it has another form, or no data sheet of such a GPU is known.
        """
        match = re.fullmatch(r"(?:GPUS=)?(\d+)x(.+)", text, re.IGNORECASE)
        name = match[2].upper().replace("-", " ").replace("_", " ") if match else ""
        tflops = data_sheet_tflops(name)
        known = [entry for entry in MEMORY_GB if f" {entry} " in f" {name} "]
        if match is None or tflops is None or not known or int(match[1]) < 1:
            raise ValueError(
                f"--plan {text}: GPUS=NxNAME is needed, such as GPUS=8xH100; NAME is one of {', '.join(MEMORY_GB)}"
            )
        return cls(int(match[1]), max(known, key=len), MEMORY_GB[max(known, key=len)] * 10**9, tflops)


@dataclass(frozen=True)
class PlannedData:
    """What is known of the data: number of samples, mean and largest number of tokens, images a sample."""

    samples: int
    mean: float
    longest: int
    images: float
    source: str


def make_plan(
    config: RunConfig,
    name: str,
    overrides: Sequence[str],
    gpus: str,
    *,
    samples: int | None = None,
    tokens: int | None = None,
    mfu: float = ASSUMED_MFU,
) -> str:
    """Return the plan of a run as text.

    Args:
        config: the run's configuration; it is not changed.
        name: of the run.
        overrides: the keys that the command line sets.
        gpus: such as `GPUS=8xH100`.
        samples: number of training samples; None: those of the data set, which has to be here.
        tokens: of a mean sample, image tokens included; None: as in the data set.
        mfu: share of the GPUs' peak that is assumed.

    Raises:
        ValueError: such GPUs are not known, or nothing is known of the data.
    """
    devices, config = Devices.parse(gpus), paper_config(config)
    objective = make_objective(config)
    model_config, processor = resolve_model(config, overrides)
    args = training_arguments(config.trainer, [*objective.training_keys(), *embedding_row_keys(config)])
    data = plan_data(config, objective, model_config, processor, args, samples, tokens)
    half = torch.bfloat16
    model, config, args, parts = prepare_on_paper(objective, model_config, processor, half=True)
    lines = [table(parts), "", f"data: {data.source}"]
    lines += _memory_lines(objective, model, config, args, processor, data, devices, half)
    lines += ["", *_time_lines(model, config, processor, data, devices, mfu)]
    if (problem := start_problem(config, name)) is not None:
        lines[:0] = [f"✗ {problem}", ""]
    return "\n".join(lines)


def plan_data(
    config: RunConfig,
    objective: Objective,
    model_config: PreTrainedConfig,
    processor: Processor,
    args: TrainingArguments,
    samples: int | None,
    tokens: int | None,
) -> PlannedData:
    """Return what is known of the data: what was said, else what the data set on this machine holds.

    Raises:
        ValueError: nothing was said, and the data set is not here.
    """
    longest = config.dataset.max_length or 2048
    if samples is not None and tokens is not None:
        said = f"{samples:,} samples of {tokens:,} tokens and an image each, as given"
        return PlannedData(samples, tokens, min(longest, 2 * tokens), 1.0, said)
    if config.dataset.path is None or not Path(config.dataset.path).exists():
        raise ValueError(
            f"dataset.path={config.dataset.path} is not on this machine: give --samples and --tokens (of a mean "
            "sample, image tokens included)"
        )
    train = cast(SampleDataset, objective.load_data(model_config, processor, args).records["train"])
    lengths, images = train.lengths, train.num_images
    number = len(lengths) if samples is None else samples
    said = f"{number:,} samples, {lengths.mean():,.0f} tokens on average, {lengths.max():,} at most"
    return PlannedData(number, float(lengths.mean()), int(lengths.max()), float(images.mean()), said)


def _memory_lines(
    objective: Objective,
    model: PreTrainedModel,
    config: RunConfig,
    args: TrainingArguments,
    processor: Processor,
    data: PlannedData,
    devices: Devices,
    dtype: torch.dtype,
) -> list[str]:
    """Return what each way of sharding needs, and the first that fits."""
    rows = config.trainer.per_device_train_batch_size
    shape = BatchShape(rows, data.longest, round(rows * max(data.images, 1)), rows * data.longest // 2)
    if config.trainer.packing:
        total = config.trainer.max_tokens_per_batch or rows * data.longest
        lengths = (data.longest,) * max(total // data.longest, 1)
        shape = BatchShape(1, sum(lengths), round(len(lengths) * max(data.images, 1)), sum(lengths) // 2, lengths)
    lines = [
        f"largest step: {shape.rows * shape.tokens:,} positions, {shape.images} images, matrix products in bfloat16"
    ]
    try:
        found = predict_memory(objective, model, config, args, dummy_image(processor)[1], [shape] * 2, dtype)
    except MemoryNotCountable as reason:
        return [*lines, f"memory is not predicted: {reason}"]
    room, fitting = int(devices.memory * USABLE), None
    for way, memory in predict_sharded(
        found, ModelSizes.of(model), devices.number, half=True, own=config.trainer
    ).items():
        fits = memory.device <= room
        fitting = way if fits and fitting is None else fitting
        beside = f" + {format_bytes(memory.host)} of the host's" if memory.host else ""
        lines.append(f"  {'fits' if fits else '    '}  {way:<16}{format_bytes(memory.device):>10}{beside}")
    verdict = "nothing fits: lower trainer.per_device_train_batch_size or dataset.max_length, or choose larger GPUs"
    lines.append(f"{format_bytes(devices.memory)} a GPU, {USABLE:.0%} of it usable")
    lines.append(verdict if fitting is None else f"the first that fits: {SHARDINGS[fitting]}")
    if not config.trainer.activation_checkpointing and fitting is None:
        lines.append("trainer.activation_checkpointing=true takes most of the activations away")
    return lines


def _time_lines(
    model: PreTrainedModel, config: RunConfig, processor: Processor, data: PlannedData, devices: Devices, mfu: float
) -> list[str]:
    """Return the steps and the time of the run."""
    trainer = config.trainer
    batch = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * devices.number
    epochs = cast(float, trainer.num_train_epochs)
    steps = trainer.max_steps if trainer.max_steps > 0 else max(round(data.samples * epochs / batch), 1)
    seen = steps * batch
    lines = [f"{steps:,} steps of {batch:,} samples"]
    try:
        flops = count_flops(model, dummy_image(processor)[1])
    except FlopsNotCountable as reason:
        return [*lines, f"time is not predicted: {reason}"]
    images = data.images * seen
    stats = BatchStats(
        seen, round(data.mean * seen), 0, round(data.mean * seen / 2), round(images), round(data.mean**2 * seen)
    )
    operations = flops.total(stats, images, images, steps)
    performed = operations * (RECOMPUTED if trainer.activation_checkpointing else 1)
    seconds = performed / (devices.number * devices.tflops * 1e12 * mfu)
    again = f", {performed:.2e} with what checkpointing recomputes" if performed > operations else ""
    lines.append(f"{operations:.2e} operations{again}")
    gpus = f"{devices.number} x {devices.name} at {mfu:.0%} of {devices.tflops:g} TFLOP/s each, which is assumed"
    lines.append(f"{format_duration(seconds)} on {gpus}; evaluation, saving and waiting for data are not in it")
    return lines
