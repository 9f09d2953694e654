"""What a language model of transformers must have to be part of a composed model; and how many positions it has.

Looked up in its configuration and in the signature of its class, before weights are loaded. What only the loaded model
shows is found before the first step, see `assembly/logit_proofs.py`.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from vlm.assembly.opening import shorten
from vlm.data.encoding.sample_encoder import NO_LIMIT
from vlm.models.configuration_vlm import VLMConfig
from vlm.models.connectors import count_tokens, keeps_grid
from vlm.models.language_inputs import PER_LAYER, look_up_ids, looks_up_ids

POSITION_KEYS = ("max_position_embeddings", "max_seq_len")
"""Keys of configurations that bound the positions of a row; MPT's is the second."""

NEEDED_KEYS = ("hidden_size", "num_hidden_layers", "vocab_size")
"""Keys that each configuration of a language model has, by these names or by aliases of them."""

BALANCE_KEY, ROUTER_KEY = "router_aux_loss_coef", "output_router_logits"
"""Keys of configurations of mixtures of experts: the coefficient of the balance loss, and whether there is one."""

MROPE_ATTRIBUTE = "mrope_section"
"""The attribute of modules that turn positions of time, row and column into rotations."""

NUM_TRIED = 4
"""Tokens of the text that a language model is tried on without weights."""

EMBEDDING_WIDTH_KEYS = ("word_embed_proj_dim", "input_embedding_size", "embedding_size")
"""Keys of configurations, such as OPT-350m's, that give embeddings another width than hidden states."""

COMPOSING_ARGUMENTS: dict[tuple[str, ...], str] = {
    ("inputs_embeds",): "it reads token ids only, and image features have none",
    ("attention_mask",): "the padding of a batch would be read as text",
}
WRITING_ARGUMENTS: dict[tuple[str, ...], str] = {
    ("logits_to_keep",): "it computes logits at all positions, not at the supervised ones alone",
    ("past_key_values", "cache_params"): "it has no cache with which `generate` could continue",
}
"""Arguments of a language model's `forward`, of which one is needed -> what a language model without them lacks."""


def max_positions(config: PreTrainedConfig) -> int:
    """Return the most tokens of a row that a model reads, by its configuration.

    It is `NO_LIMIT` where nothing bounds them, as for Bloom (ALiBi) and Mamba.
    """
    text = config.get_text_config()
    bounds = (getattr(text, key, None) for key in POSITION_KEYS)
    return next((bound for bound in bounds if isinstance(bound, int) and bound > 0), NO_LIMIT)


def check_language_model(config: PreTrainedConfig, label: str) -> None:
    """Raise ValueError if a language model cannot be part of a composed model.

    Args:
        config: the language model's configuration.
        label: its key and name, such as `model.language_model.hf_name=NAME`.
    """
    _raise_first(_composing_problems(config), label)


def check_writes(model_config: PreTrainedConfig) -> None:
    """Raise ValueError if the language model of a composed model cannot learn to write, by its configuration.

    `model_config` is that of a composed model, or of a family, whose language models all can.
    """
    if model_config.model_type == VLMConfig.model_type:
        name = model_config.recipe["language_model"]["hf_name"]
        _raise_first(_writing_problems(model_config.text_config), f"model.language_model.hf_name={name}")


def set_balance_loss(config: PreTrainedConfig, coefficient: float | None, label: str) -> None:
    """Write `model.language_model.balance_loss` into a language model's configuration; None leaves it as it is.

    Raises:
        ValueError: the language model has no such loss; names the key and the model (`label`).
    """
    model_class = _find_class(config)
    arguments = {} if model_class is None else inspect.signature(model_class.forward).parameters
    has_loss = hasattr(config, BALANCE_KEY) and ROUTER_KEY in arguments
    if coefficient is None and getattr(config, ROUTER_KEY, False) and not has_loss:
        coefficient = 0.0  # it would give logits of routers that nothing reads
    if coefficient and not has_loss:
        raise ValueError(
            f"model.language_model.balance_loss={coefficient}: {label} (model_type={config.model_type}) has no loss "
            "that balances experts; null or 0 is needed"
        )
    if coefficient is not None and hasattr(config, ROUTER_KEY):
        setattr(config, ROUTER_KEY, coefficient > 0)
    if coefficient:
        setattr(config, BALANCE_KEY, coefficient)


def check_positions(config: VLMConfig, label: str) -> None:
    """Raise ValueError if a composition has positions in rows and columns that its parts do not allow.

    Args:
        config: the composition.
        label: the key and name of the language model.
    """
    if config.positions == "plain":
        return
    key, text = f"model.language_model.positions={config.positions}", config.text_config
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(text))
    if not any(hasattr(module, MROPE_ATTRIBUTE) for module in model.modules()):
        raise ValueError(
            f"{key}: {label} (model_type={text.model_type}) has positions in one dimension only; choose plain, or a "
            "language model of Qwen3.5"
        )
    kind = config.connector["type"]
    tokens = None if config.native is not None else count_tokens(kind, config.num_features, config.connector["options"])
    has_queries = (config.native or {}).get("num_queries") is not None
    is_grid = tokens is None or (math.isqrt(tokens) ** 2 == tokens and config.feature_strategy == "patch")
    if config.anyres is not None or has_queries or not keeps_grid(kind) or not is_grid:
        raise ValueError(
            f"{key}: the tokens of an image form no grid with model.connector.type={kind} and "
            f"model.anyres={'tiles' if config.anyres else 'none'}; plain is needed"
        )


def _raise_first(problems: Iterator[str], label: str) -> None:
    if (problem := next(problems, None)) is not None:
        raise ValueError(f"{label}: {problem}. Choose another, such as model/language_model=qwen3-0.6b")


def _composing_problems(config: PreTrainedConfig) -> Iterator[str]:
    """Yield why image features cannot stand among a language model's embeddings."""
    kind = config.model_type
    if _find_class(config) is None:
        yield f"transformers has no causal language model (AutoModelForCausalLM) for model_type={kind}"
        return
    for key in NEEDED_KEYS:
        if not isinstance(getattr(config, key, None), int):
            yield f"the configuration of model_type={kind} has no {key}"
    for key in EMBEDDING_WIDTH_KEYS:
        if (width := getattr(config, key, config.hidden_size)) != config.hidden_size:
            yield (
                f"its embeddings ({key}={width}) are not as wide as its hidden states (hidden_size="
                f"{config.hidden_size}), for which connectors are made"
            )
    if getattr(config, "hidden_size_per_layer_input", None) and not _takes_lookups(config):
        yield (
            f"model_type={kind} embeds token ids again in each layer (hidden_size_per_layer_input) and does not "
            "accept per_layer_inputs instead; image features have no ids"
        )
    yield from _missing_arguments(config, COMPOSING_ARGUMENTS)
    if (problem := _try_embeddings(config)) is not None:
        yield problem


def _writing_problems(config: PreTrainedConfig) -> Iterator[str]:
    """Yield why a language model cannot learn to write, or could not answer afterwards."""
    kind = config.model_type
    if config.is_encoder_decoder or type(config)().is_encoder_decoder:  # its decoder alone is saved with false
        yield (
            f"model_type={kind} is the decoder of an encoder-decoder model, which counts positions from the start of a "
            "padded row, so that answers in batches would be wrong"
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        yield (
            f"model_type={kind} with is_decoder=false is an encoder, whose tokens see later tokens; a causal language "
            "model is needed"
        )
    yield from _missing_arguments(config, WRITING_ARGUMENTS)


def _takes_lookups(config: PreTrainedConfig) -> bool:
    """Return whether a language model takes what it looks up by ids in each layer from outside."""
    decoder = AutoModel._model_mapping.get(type(config), None)
    return isinstance(decoder, type) and looks_up_ids(decoder)


def _try_embeddings(config: PreTrainedConfig) -> str | None:
    """Return why a language model fails on embeddings, by running it without weights; None if it does not.

    What fails on ids of tokens too says nothing of embeddings: not all code runs without numbers.
    """
    model_class = _find_class(config)
    assert model_class is not None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = model_class(copy.deepcopy(config)).eval()
        ids = torch.zeros(1, NUM_TRIED, dtype=torch.long)
        embeddings = torch.zeros(1, NUM_TRIED, config.hidden_size)
        mask = torch.ones_like(ids)
        try:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        except Exception:  # whatever it is, it has nothing to do with images
            return None
        further = {PER_LAYER: look_up_ids(model.get_decoder(), ids, 0, 0)} if _takes_lookups(config) else {}
        try:
            model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **further)
        except (AttributeError, TypeError, LookupError, ValueError) as error:
            kind = type(error).__name__
            return (
                f"the code of model_type={config.model_type} needs token ids, which image features do not have "
                f"({kind}: {shorten(str(error))})"
            )
    return None


def _missing_arguments(config: PreTrainedConfig, needed: Mapping[tuple[str, ...], str]) -> Iterator[str]:
    model_class = _find_class(config)
    arguments = set() if model_class is None else set(inspect.signature(model_class.forward).parameters)
    for names, lack in needed.items():
        if arguments.isdisjoint(names):
            yield f"model_type={config.model_type} does not accept {names[0]}: {lack}"


def _find_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    mapping = AutoModelForCausalLM._model_mapping
    assert mapping is not None
    return cast("type[PreTrainedModel] | None", mapping.get(type(config), None))
