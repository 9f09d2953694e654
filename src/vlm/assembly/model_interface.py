"""What training uses of a model, whether composed, of a family or with prediction heads.

Imports torch and transformers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


class TrainableModel(Protocol):
    """The interface between a model and the code that trains it: parts, adapters, objectives and the trainer.

    `vlm.assembly.model_kinds` distinguishes kinds (`is_composed_model`, `is_prediction_model`) and returns the
    vision-language model under prediction heads (`get_body`).
    """

    config: PreTrainedConfig
    """The model's configuration, by which `get_part_names` says which parameter belongs to which part."""
    training: bool

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the weights."""
        ...

    def __call__(self, *args: object, **inputs: object) -> Any:
        """Return the outputs of a batch, with the scalar `loss` if the batch has labels."""
        ...

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode; frozen encoders and bodies stay in evaluation mode."""
        ...

    def eval(self) -> Self:
        """Switch to evaluation mode."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return every parameter once."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return every parameter once, by its full name."""
        ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Return every buffer once, by its full name."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Return the model and every module in it."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the model and every module in it, by full names."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that checkpoints hold."""
        ...

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's embeddings."""
        ...

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language model's vocabulary head."""
        ...

    def get_decoder(self) -> nn.Module:
        """Return the language model without its vocabulary head."""
        ...

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the complete model into a folder."""
        ...
