"""Two ways to train the same model on the same samples: a run of this framework, and transformers' own `Trainer`.

`run_ours` is the run that `vlm` starts, with a timer and a record of its batches. `train_padded` follows the
documentation of transformers: `LlavaForConditionalGeneration`, a collator that pads to the longest sample of a batch
with labels of -100, and `Trainer`. Its samples are encoded and its images decoded in advance; ours are not.
"""

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.shapes import model_keys
from vlm.checks.compose import open_mapping_key
from vlm.checks.run import check
from vlm.config.schema import RunConfig
from vlm.data.batching.packing import SEQUENCE_STARTS
from vlm.data.batching.stats import BatchStats
from vlm.data.batching.step_layout import MORE_ROWS, get_rows
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.train import make_trainer as making
from vlm.train.monitor.speed import SpeedMeter
from vlm.train.objectives.table import make_objective
from vlm.train.run import run
from vlm.train.trainer import VLMTrainer

LEARNING_RATE = 1e-4
"""Learning rate of connector and language model, in every variant."""
SEED = 42
"""Seed of a run's initial weights and order: the default of `trainer.seed`."""

Sample = dict[str, Any]
"""`input_ids` and `labels` of one sample, and `pixel_values` `(images, 3, height, width)` where it has images."""


@dataclass
class Steps:
    """The measured steps of a training run.

    Attributes:
        name: the name that is printed after each step.
        seconds: seconds of each optimiser step, from the end of the previous one: loading and logging are included.
        core_seconds: the same of all cores together, on which other processes do not count.
        flops: counted operations of each optimiser step of ours, where they can be counted.
        losses: the logged loss of each optimiser step.
        norms: gradient norm of each optimiser step, before clipping.
        batches: the model's inputs of each optimiser step, as they came out of the loader.
        trainer: the run's trainer.
        begun: when the run was started.
        seconds_to_first_step: seconds from `begun` to the end of the first optimiser step.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    core_seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    batches: list[list[dict[str, Any]]] = field(default_factory=list)
    trainer: Any = None
    begun: float = field(default_factory=time.perf_counter)
    seconds_to_first_step: float = 0.0


class StepTimer(TrainerCallback):
    """Measures the time of optimiser steps."""

    def __init__(self, steps: Steps):
        self.steps = steps
        self.last = self.last_core_time = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock: the model is ready, and no data has been loaded."""
        self.last, self.last_core_time = synchronized_time(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the time of a step."""
        last, self.last = self.last, synchronized_time()
        last_core_time, self.last_core_time = self.last_core_time, time.process_time()
        self.steps.core_seconds.append(self.last_core_time - last_core_time)
        if not self.steps.seconds:
            self.steps.seconds_to_first_step = self.last - self.steps.begun
        self.steps.seconds.append(self.last - last)
        print(f"  {self.steps.name}: step {len(self.steps.seconds)} took {self.steps.seconds[-1]:.2f} s", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record the step's loss and gradient norm."""
        if "loss" in logs:
            self.steps.losses.append(float(logs["loss"]))
            self.steps.norms.append(float(logs["grad_norm"]))


def synchronized_time() -> float:
    """Return the time in seconds, once the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_ours(
    parts: Path, records: Path, folder: Path, *words: str, name: str = "finetune-smol", keeps: bool = False,
    saves: bool = False, model: Sequence[str] = (),
) -> Steps:  # fmt: skip
    """Start a run as `vlm` does, and train it to its end.

    Args:
        parts: the folder of encoder and language model.
        records: the file of records; their images are in `images` beside it.
        folder: the run directory.
        words: further overrides.
        name: the name of the run's configuration.
        keeps: whether to keep the batches.
        saves: whether to save the trained model at the end, which is not part of any step.
        model: overrides that choose another model than the one of `parts`.
    """
    steps = Steps(folder.name)

    class WatchedTrainer(VLMTrainer):
        """The run's trainer, with a timer and a record of its batches."""

        def __init__(self, **kwargs: Any):
            super().__init__(**kwargs)
            count_steps(self.meter, steps)
            self.add_callback(StepTimer(steps))
            self.remove_callback(PrinterCallback)
            steps.trainer = self

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, number = super().get_batch_samples(*args, **kwargs)
            rows = [row for batch in batches for row in get_rows(batch)]
            steps.batches.append(
                [{name: row[name] for name in row if name != MORE_ROWS} for row in rows] if keeps else []
            )
            return batches, number

    keys = [*(model or model_keys(parts)), *data_keys(records), *TRAINING, f"trainer.output_dir={folder}", *words]
    config = compose_config(name, keys)
    check(config, make_objective(config))
    unsaved = nullcontext() if saves else patch("vlm.train.run.write_final")
    with patch.object(making, "VLMTrainer", WatchedTrainer), unsaved:
        steps.begun = time.perf_counter()
        run(config, name, [key.split("=")[0] for key in keys])
    return steps


def count_steps(meter: SpeedMeter, steps: Steps) -> None:
    """Let a run's meter write the operations of each step down."""
    add = meter.add

    def add_counted(batches: Sequence[tuple[BatchStats, int, int]]) -> None:
        """Count, and do as usual."""
        if (flops := meter.flops) is not None:
            steps.flops.append(sum(flops.total(*batch, 1) for batch in batches))
        add(batches)

    meter.add = add_counted


def data_keys(records: Path) -> list[str]:
    """Return the overrides with which a run reads these records."""
    return [
        f"dataset.path={records}",
        f"dataset.image_folder={records.parent / 'images'}",
        f"dataset.cache_dir={records.parent / 'cache'}",
        "dataset.template=chatml",
    ]


TRAINING = (
    "trainer.num_train_epochs=1",
    f"trainer.learning_rate.connector_learning_rate={LEARNING_RATE}",
    f"trainer.learning_rate.language_model_learning_rate={LEARNING_RATE}",
    "trainer.lr_scheduler_type=constant",
    "trainer.warmup_steps=0",
    "trainer.logging_steps=1",
    "trainer.save_strategy=no",
    "trainer.num_samples=0",
    "trainer.report_to=none",
    "trainer.disable_tqdm=true",
    "trainer.train_sampling_strategy=random",
    "trainer.packing=true",
    "trainer.packing_strategy=best_fit",
    f"trainer.use_cpu={str(not torch.cuda.is_available()).lower()}",
    f"trainer.dataloader_num_workers={4 if torch.cuda.is_available() else 0}",
)
"""Overrides of every run; on a CPU all cores compute, and none is left for data workers."""


def compose_config(name: str, words: Sequence[str]) -> RunConfig:
    """Return a shipped run's configuration with overrides."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
    with initialize_config_module("vlm.config", version_base="1.3"):
        config: Any = OmegaConf.to_object(compose(name, [open_mapping_key(word) for word in words]))
    return config


# --- the samples of a step -------------------------------------------------------------------------------------------


def split_packed_batch(batch: dict[str, Any], processor: Any) -> list[Sample]:
    """Return the samples of a packed row, without dummies, which have no supervised tokens."""
    pixels = batch.get("pixel_values")
    if pixels is not None:
        pixels = processor.normalise(pixels)
        pixels = pixels if batch.get("image_index") is None else pixels[batch["image_index"]]
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    starts, samples, images = batch[SEQUENCE_STARTS].tolist(), [], 0
    for start, end in pairwise(starts):
        sample: Sample = {"input_ids": ids[start:end].tolist(), "labels": labels[start:end].tolist()}
        number = sample["input_ids"].count(processor.image_token_id) // processor.tokens_per_image
        if number:
            assert pixels is not None
            sample["pixel_values"] = pixels[images : images + number]
        images += number
        if any(label != IGNORE_INDEX for label in sample["labels"]):
            samples.append(sample)
    return samples


def read_micro_batches(run: Steps) -> list[list[list[Sample]]]:
    """Return the micro-batches of each step of a run's first epoch, as its loader has them without packing.

    The run packs its steps, see `vlm.train.step.step_packing`; pixels are normalised.
    """
    trainer = run.trainer
    trainer.sampler.set_epoch(0)
    batches = [[read_sample(trainer, index) for index in batch] for batch in trainer.sampler.batches]
    accumulation = trainer.args.gradient_accumulation_steps
    return [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]


def read_sample(trainer: Any, index: int) -> Sample:
    """Return a training sample of a run, with normalised pixels."""
    sample = {name: value for name, value in trainer.train_dataset[index].items() if value is not None}
    if "pixel_values" in sample:
        sample["pixel_values"] = trainer.processor.normalise(sample["pixel_values"])
    return sample


def group_by_length(micro_batches: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """Return micro-batches of the same samples, sorted by length, of about equal size."""
    order = sorted(chain.from_iterable(micro_batches), key=lambda sample: len(sample["input_ids"]))
    number = len(micro_batches)
    bounds = [round(len(order) * index / number) for index in range(number + 1)]
    return [order[start:end] for start, end in pairwise(bounds)]


def count_padded_positions(micro_batch: Sequence[Sample]) -> int:
    """Return the number of positions of a padded micro-batch."""
    return len(micro_batch) * max(len(sample["input_ids"]) for sample in micro_batch)


# --- transformers' own -----------------------------------------------------------------------------------------------


class MicroBatches(Dataset[Any]):
    """Micro-batches in a fixed order, each of them an item."""

    def __init__(self, micro_batches: Sequence[list[Sample]]):
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __getitem__(self, index: int) -> list[Sample]:
        return self.micro_batches[index]


class PaddingCollator:
    """Pads ids and labels as transformers does, and concatenates images."""

    def __init__(self, tokenizer: Any):
        self.pad = DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=IGNORE_INDEX)

    def __call__(self, items: list[list[Sample]]) -> dict[str, Tensor]:
        """Return one micro-batch."""
        (samples,) = items
        rows = [{name: sample[name] for name in ("input_ids", "labels")} for sample in samples]
        batch = dict(self.pad(rows))
        if pixels := [sample["pixel_values"] for sample in samples if "pixel_values" in sample]:
            batch["pixel_values"] = torch.cat(pixels)
        return batch


def train_padded(
    model: Any, tokenizer: Any, steps: Sequence[Sequence[list[Sample]]], folder: Path, **settings: Any
) -> Steps:
    """Train transformers' LLaVA, its encoder frozen, on these micro-batches of each optimiser step."""
    run = Steps(folder.name)
    model.model.vision_tower.requires_grad_(False)
    tokenizer.padding_side = "right"
    (accumulation,) = {len(step) for step in steps}
    settings = {"use_cpu": not torch.cuda.is_available(), "optim": "adamw_torch_fused"} | settings
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=accumulation,
        num_train_epochs=1, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
        train_sampling_strategy="sequential", remove_unused_columns=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=MicroBatches([batch for step in steps for batch in step]),
        data_collator=PaddingCollator(tokenizer), callbacks=[StepTimer(run)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return run


def release_memory(steps: Steps) -> Steps:
    """Release model and optimiser, whose memory the next variant needs, and return the measurements."""
    steps.trainer = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return steps


def silence_libraries() -> None:
    """Let libraries log errors only."""
    logging.disable(logging.INFO)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
