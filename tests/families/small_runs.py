"""Training a small model of any type with the framework's own pieces, in one process and without a run directory."""

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.fixtures import compose_config
from vlm.assembly.saving import save_complete, set_reply_ends
from vlm.assembly.small_models.defaults import UNSUPPORTED
from vlm.assembly.small_models.make import make_small
from vlm.config.schema import PARTS, TRAIN_FLAGS, RunConfig, UnfreezeConfig
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import encode
from vlm.data.sample import ImageRef, Sample, Turn
from vlm.evaluation.loss import sample_losses
from vlm.families.meta_model import get_auto_class
from vlm.families.parts import get_part_names
from vlm.families.processing import FamilyProcessor
from vlm.families.row_by_row import keep_apart
from vlm.families.table import get_family
from vlm.models.text_loss import SupervisedScores, token_losses
from vlm.train import parts as run_parts
from vlm.train.objectives.generation import Generation

TYPES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - UNSUPPORTED.keys())
"""The types that small models are made of."""
SIZES = ((60, 48), (40, 64))
"""Widths and heights of the images."""
RATE = 1e-3
"""Large enough that every step is seen in the weights, and small enough for every model."""


@cache
def small_config() -> RunConfig:
    """Return the settings of a run on a whole model."""
    rates = [f"trainer.learning_rate.{part}_learning_rate={RATE}" for part in PARTS]
    return compose_config("finetune-llava-onevision", ["dataset.path=x", "trainer.bf16=false", *rates])


def make_row(processor: FamilyProcessor, seed: int) -> dict[str, object]:
    """Return a question about an image, with its reply."""
    width, height = SIZES[seed % len(SIZES)]
    image = Image.new("RGB", (width, height), ("red", "blue")[seed % 2])
    sample = Sample("x", (Turn("user", (ImageRef(Path()), "what is it?")), Turn("assistant", ("a cat" * (seed + 1),))))
    return model_inputs(processor, encode(processor, sample, [(height, width)]), [image])


@dataclass
class SmallRun:
    """A small model with its processor and a batch of two samples."""

    model: PreTrainedModel
    processor: FamilyProcessor
    batch: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model_type: str) -> "SmallRun":
        """Make the small model of a type."""
        small = make_small(model_type)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_auto_class(small.config).from_config(small.config, dtype=torch.float32)
        keep_apart(model)
        processor = FamilyProcessor(small.processor, get_family(model_type))
        set_reply_ends(model, processor)
        collate = Collator.of(processor, dummy_image(processor))
        return cls(model, processor, collate([make_row(processor, seed) for seed in range(2)]))

    def train(self, frozen: str, steps: int = 2) -> tuple[list[float], dict[str, set[str]]]:
        """Train all parts but one; return the losses, and which parameters of each part have changed."""
        config = small_config()
        flags = {TRAIN_FLAGS[part]: part != frozen for part in PARTS}
        options = copy.copy(config.trainer)
        options.unfreeze = UnfreezeConfig(**flags)
        parts = run_parts.make_parts(self.model, options, config.model)
        run_parts.freeze(parts)
        before = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        groups = run_parts.parameter_groups(parts, [name for name, _ in self.model.named_parameters()])
        optimizer = torch.optim.AdamW(groups)
        objective, trainer = Generation(config), SimpleNamespace(model=self.model)
        self.model.train()
        losses = []
        for _ in range(steps):
            loss, _ = objective.compute_loss(trainer, self.model, self.batch, None)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        changed = {
            part.name: {name for name, weight in part.parameters.items() if not torch.equal(weight, before[name])}
            for part in parts
        }
        return losses, changed

    @property
    def empty_parts(self) -> set[str]:
        """The parts without parameters that train: patches may go straight to the language model, or become ids."""
        names = get_part_names(self.model.config)
        return {*PARTS} - {
            names.part_of(name) for name, _ in self.model.named_parameters() if not names.is_unused(name)
        }

    def evaluate(self) -> float:
        """Return the loss per supervised token."""
        self.model.eval()
        sums, counts = sample_losses(SupervisedScores(self.model, token_losses), [self.batch])
        return (sums.sum() / counts.sum()).item()

    def save(self, folder: Path) -> None:
        """Write the model and its processor as a run does."""
        save_complete(self.model, folder)
        self.processor.save_pretrained(folder)
