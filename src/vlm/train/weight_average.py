"""An exponential moving average of the weights that train: what is evaluated and what `final` holds.

After step `t`, counted from 1, `average <- d average + (1 - d) weights` with `d = min(decay, (1 + t) / (10 + t))`: an
average of few steps forgets the weights that the run began with sooner (as TensorFlow's ExponentialMovingAverage).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGE_FILE = "average.safetensors"
"""The file of a checkpoint that holds the average."""


class WeightAverage(TrainerCallback):
    """Keeps the average in float32; each rank has its own, and all are equal. A `SavedWithCheckpoint`.

    Args:
        model: the model, not wrapped; its parameters that train are whole on every rank.
        decay: the share of the average that a step keeps.
        is_writer: whether this rank writes.
    """

    def __init__(self, model: nn.Module, decay: float, *, is_writer: bool):
        self.model, self.decay, self.is_writer = model, decay, is_writer
        self.average: dict[str, Tensor] = {}
        self.is_in_place = False

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters that train."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Begin with the weights of the start, where no checkpoint brought an average."""
        weights = self.weights
        for name, weight in weights.items():
            start = self.average.get(name, weight)
            self.average[name] = start.detach().to(weight.device, torch.float32, copy=True)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Take the weights after a step into the average."""
        step, weights = state.global_step, self.weights
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, weight in weights.items():
            self.average[name].lerp_(weight.float(), share)

    @torch.no_grad()
    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Put the average in place for good: the run's last checkpoint, with the weights, is written."""
        self._put(self.average)
        self.is_in_place = True

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averaged weights."""
        if self.is_in_place or not self.average:
            yield
            return
        kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._put(self.average)
        self.is_in_place = True
        try:
            yield
        finally:
            self._put(kept)
            self.is_in_place = False

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(tensors[name])

    def save_to(self, checkpoint: Path) -> None:
        """Write the average."""
        if self.is_writer:
            save_file({name: tensor.contiguous() for name, tensor in self.average.items()}, checkpoint / AVERAGE_FILE)

    def load_from(self, checkpoint: Path) -> None:
        """Read the average.

        Raises:
            ValueError: the checkpoint has none of these weights.
        """
        file = checkpoint / AVERAGE_FILE
        self.average = load_file(file) if file.is_file() else {}
        if missing := sorted(self.weights.keys() ^ self.average.keys()):
            raise ValueError(
                f"trainer.average_decay={self.decay:g}: {file} lacks weights that train, for example "
                f"{missing[0]}; resume with the trainer.average_decay of the checkpoint"
            )
