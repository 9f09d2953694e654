"""What models around a language model have in common: their output, their embeddings, classes that travel with them.

Hub code: imports torch and transformers only.

Shapes: B rows, T tokens a row, S supervised positions.
"""

import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import ModelOutput


@dataclass
class VLMOutput(ModelOutput):
    """The result of a forward pass.

    Args:
        loss: mean cross-entropy over the supervised positions, or their sum over `num_items_in_batch`; a scalar.
        logits: with `labels`, `(S, vocabulary)`: the supervised positions in order; else `(B, kept, vocabulary)`.
        past_key_values: the language model's cache.
        hidden_states: the language model's, where requested.
        attentions: the language model's, where requested.
        cache_params: the language model's cache where it is a state space model, in place of `past_key_values`.
        aux_loss: the balance loss of a mixture of experts, before its coefficient; a scalar.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cache_params: object | None = None
    aux_loss: Tensor | None = None


def load_travelling_class(reference: str, name: str) -> Any:
    """Return a class of a file that travels with a checkpoint, `file.Class`.

    Raises:
        ValueError: the reference names the code of another repository (`owner/name--file.Class`).
    """
    if "--" in reference:
        raise ValueError(f"{name}: {reference} is not a class of a file that travels with the checkpoint")
    return get_class_from_dynamic_module(reference, name)


class WrapperModel(PreTrainedModel):
    """A model around the one that `wrapped` names, whose embeddings and decoder it has."""

    wrapped: str
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - as transformers declares it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves; modules of connectors and heads keep PyTorch's own initialisation."""
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def initialize_weights(self) -> None:
        """Initialise what a checkpoint does not hold, such as buffers that parts compute of their configurations.

        Parts do it first, as models of transformers: within a model that is not of transformers, a module without
        parameters of its own would be passed over, and with it the buffers that it sets in others (Falcon-H1).
        """
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and module is not self:
                module.initialize_weights()
        super().initialize_weights()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's input embeddings."""
        return getattr(self, self.wrapped).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embeddings."""
        getattr(self, self.wrapped).set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language model's vocabulary head."""
        return getattr(self, self.wrapped).get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's vocabulary head."""
        getattr(self, self.wrapped).set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """Return the language model without its vocabulary head."""
        wrapped = getattr(self, self.wrapped)
        decoder = wrapped.get_decoder()
        if decoder is wrapped or not isinstance(decoder, PreTrainedModel):  # as of Llama 4, and of ModernBERT's decoder
            return wrapped.model
        return decoder

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save the model, with the files of a user's own connector and head classes beside the hub code."""
        self.save_custom_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    def save_custom_code(self, save_directory) -> None:
        """Copy the files of a user's own classes, if there are any, and note them in the configuration."""
        raise NotImplementedError


def copy_class_file(kind: type, file: Path) -> str:
    """Copy the file that defines a class; return the name of the class in `auto_map`."""
    source = Path(inspect.getfile(kind))
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.resolve() != source.resolve():
        shutil.copyfile(source, file)
    return f"{file.stem}.{kind.__name__}"
