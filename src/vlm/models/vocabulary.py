"""The vocabulary head of a model, which some classes of transformers do not name themselves.

Hub code: imports torch and transformers only.
"""

from collections.abc import Iterator
from typing import Protocol, cast

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


class WithVocabulary(Protocol):
    """What is asked of a model here."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings."""
        ...

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the vocabulary head; None where the class names none."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Return the model and every module in it."""
        ...


def find_vocabulary_head(model: WithVocabulary) -> nn.Module | None:
    """Return a model's vocabulary head, or that of the causal language model within it; None without any."""
    owner = find_head_owner(model)
    return None if owner is None else owner.get_output_embeddings()


def find_head_owner(model: WithVocabulary) -> WithVocabulary | None:
    """Return the model that names the vocabulary head: the given one, else the causal language model within it.

    That one reads the same embeddings, and is of a class that `AutoModelForCausalLM` makes: decoders of other classes,
    such as BLIP's, are no language models on their own. None without any, or where there are several.
    """
    if model.get_output_embeddings() is not None:
        return model
    embeddings, classes = model.get_input_embeddings(), AutoModelForCausalLM._model_mapping
    inner = [
        module
        for module in model.modules()
        if module is not model
        and isinstance(module, PreTrainedModel)
        and classes.get(type(module.config), None) is type(module)
        and module.get_input_embeddings() is embeddings
        and module.get_output_embeddings() is not None
    ]
    return inner[0] if len(inner) == 1 else None


def resize_vocabulary(model: PreTrainedModel, rows: int, multiple: int | None = None) -> None:
    """Give a model's embeddings and its vocabulary head a row for each of `rows` tokens, padded to a multiple."""
    owner = cast(PreTrainedModel, find_head_owner(model) or model)
    owner.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
    model.config.get_text_config().vocab_size = owner.config.get_text_config().vocab_size
