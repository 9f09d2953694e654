"""Two ways to train the same model on the same samples: a run of this framework, and transformers' own `Trainer`.

`run_ours` is the run that `vlm` starts, with a clock in it and an ear for its batches. `train_padded` is what the
documentation of transformers shows: `LlavaForConditionalGeneration`, a collator that pads to the longest sample of a
batch with labels of -100, and `Trainer`. Its samples are encoded and its images decoded beforehand; ours are
not.
"""

import gc
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
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
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.train import make_trainer as making
from vlm.train.objectives.table import make_objective
from vlm.train.run import run
from vlm.train.trainer import VLMTrainer

LEARNING_RATE = 1e-4
"""Of connector and language model, in every variant."""
SEED = 42
"""Of a run's first weights and order, which is the default of `trainer.seed`."""

Sample = dict[str, Any]
"""`input_ids` and `labels` of one sample, and `pixel_values` `(images, 3, height, width)` where it has images."""


@dataclass
class Steps:
    """What a training run did.

    Attributes:
        name: what ran, which is printed after each step.
        seconds: of each optimiser step, from the end of the one before it: loading and logging belong to it.
        losses: of each optimiser step, as it was logged.
        norms: of each optimiser step's gradient, before it is clipped.
        batches: of each optimiser step the inputs of the model, as they came out of the loader.
        trainer: what trained.
        begun: when the run was started.
        seconds_to_first_step: seconds from there to the end of its first optimiser step.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    batches: list[list[dict[str, Any]]] = field(default_factory=list)
    trainer: Any = None
    begun: float = field(default_factory=time.perf_counter)
    seconds_to_first_step: float = 0.0


class StepTimer(TrainerCallback):
    """Times optimiser steps, and stamps when the first begins."""

    def __init__(self, steps: Steps):
        self.steps = steps
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is ready; nothing has been loaded."""
        self.last = synchronized_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is over, all but its log."""
        last, self.last = self.last, synchronized_time()
        if not self.steps.seconds:
            self.steps.seconds_to_first_step = self.last - self.steps.begun
        self.steps.seconds.append(self.last - last)
        print(f"  {self.steps.name}: step {len(self.steps.seconds)} took {self.steps.seconds[-1]:.2f} s", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The step's loss, and how long its gradient is."""
        if "loss" in logs:
            self.steps.losses.append(float(logs["loss"]))
            self.steps.norms.append(float(logs["grad_norm"]))


def synchronized_time() -> float:
    """Seconds, once what a GPU was told to do is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_ours(
    parts: Path, records: Path, folder: Path, *words: str, name: str = "finetune-smol", keeps: bool = False,
    saves: bool = False,
) -> Steps:  # fmt: skip
    """Start a run as `vlm` does, and train it to its end.

    Args:
        parts: where encoder and language model are.
        records: the file of records; their images are in `images` beside it.
        folder: the run directory.
        words: further overrides.
        name: the run's configuration.
        keeps: whether its batches are kept.
        saves: whether the trained model is saved at the end, which is not part of any step.
    """
    steps = Steps(folder.name)

    class WatchedTrainer(VLMTrainer):
        """The run's trainer, watched."""

        def __init__(self, **kwargs: Any):
            super().__init__(**kwargs)
            self.add_callback(StepTimer(steps))
            self.remove_callback(PrinterCallback)
            steps.trainer = self

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, number = super().get_batch_samples(*args, **kwargs)
            steps.batches.append([dict(batch) for batch in batches] if keeps else [])
            return batches, number

        def save_model(self, *args: Any, **kwargs: Any) -> None:
            if saves:
                super().save_model(*args, **kwargs)

    keys = [*model_keys(parts), *data_keys(records), *TRAINING, f"trainer.output_dir={folder}", *words]
    config = compose_config(name, keys)
    check(config, make_objective(config))
    with patch.object(making, "VLMTrainer", WatchedTrainer):
        steps.begun = time.perf_counter()
        run(config, name, [key.split("=")[0] for key in keys])
    return steps


def data_keys(records: Path) -> list[str]:
    """What a run is told to read these records."""
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
    f"trainer.use_cpu={str(not torch.cuda.is_available()).lower()}",
    f"trainer.dataloader_num_workers={4 if torch.cuda.is_available() else 0}",
)
"""How every run is told to train; on a CPU all cores compute, and none is left for data workers."""


def compose_config(name: str, words: Sequence[str]) -> RunConfig:
    """A shipped run's configuration under overrides."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
    with initialize_config_module("vlm.config", version_base="1.3"):
        config: Any = OmegaConf.to_object(compose(name, [open_mapping_key(word) for word in words]))
    return config


# --- the samples of a step -------------------------------------------------------------------------------------------


def split_packed_batch(batch: dict[str, Any], processor: Any) -> list[Sample]:
    """The samples that stand in a packed batch; dummies, which nothing supervises, are none."""
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


def make_micro_batches(samples: Sequence[Sample], number: int, *, grouped: bool, seed: int = 0) -> list[list[Sample]]:
    """A step's samples in so many micro-batches of about equal size: as drawn, or sorted by length."""
    order = list(samples)
    random.Random(seed).shuffle(order)
    if grouped:
        order.sort(key=lambda sample: len(sample["input_ids"]))
    bounds = [round(len(order) * place / number) for place in range(number + 1)]
    return [order[start:end] for start, end in pairwise(bounds)]


def count_padded_positions(micro_batch: Sequence[Sample]) -> int:
    """Positions of a micro-batch once it is padded."""
    return len(micro_batch) * max(len(sample["input_ids"]) for sample in micro_batch)


# --- transformers' own -----------------------------------------------------------------------------------------------


class MicroBatches(Dataset[Any]):
    """Micro-batches in a settled order, each of them an item."""

    def __init__(self, micro_batches: Sequence[list[Sample]]):
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __getitem__(self, index: int) -> list[Sample]:
        return self.micro_batches[index]


class PaddingCollator:
    """Pads ids and labels as transformers does, and lays the images one after the other."""

    def __init__(self, tokenizer: Any):
        self.pad = DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=IGNORE_INDEX)

    def __call__(self, items: list[list[Sample]]) -> dict[str, Tensor]:
        """One micro-batch."""
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
    done = Steps(folder.name)
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
        model=model, args=args, train_dataset=MicroBatches([one for step in steps for one in step]),
        data_collator=PaddingCollator(tokenizer), callbacks=[StepTimer(done)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return done


def release_memory(steps: Steps) -> Steps:
    """What was measured, without model and optimiser, whose memory the next variant needs."""
    steps.trainer = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return steps


def silence_libraries() -> None:
    """Let libraries say only what goes wrong."""
    logging.disable(logging.INFO)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
