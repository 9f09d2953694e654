"""Language models in llama.cpp's names: their settings, and how their weights differ from transformers'.

To add an architecture, write its settings and add a line to `ARCHITECTURES`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vlm.hub.gguf.tensors import AS_IT_IS, Change, PlannedTensor, StoredType, choose_stored_type

GEMMA3_PERIOD = 6
"""Every sixth layer of Gemma 3 in llama.cpp attends to everything, the others to a window."""

LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""Number of layers of the sizes (27B) whose queries llama.cpp scales by the width over the number of heads."""


class Architecture(NamedTuple):
    """A language model that llama.cpp has."""

    arch: gguf.MODEL_ARCH
    add_settings: Callable[[gguf.GGUFWriter, PreTrainedConfig], None]
    """Writes what not all architectures have."""
    incompatibilities: Callable[[PreTrainedConfig], Iterator[str]]
    """Why a configuration has no place in llama.cpp; nothing where it has."""
    make_change: Callable[[str, PreTrainedConfig], Change]
    """The change of a weight, by its name in transformers."""


def head_dim(config: PreTrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def find_incompatibilities(config: PreTrainedConfig) -> Iterator[str]:
    """Yield why llama.cpp cannot run a language model as it was trained."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        yield f"a language model of model_type={config.model_type}: possible are {', '.join(ARCHITECTURES)}"
        return
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if (expected := ACTIVATIONS[config.model_type]) != activation:
        yield f"a {config.model_type} with hidden_act={activation}: llama.cpp has {expected}"
    yield from architecture.incompatibilities(config)
    yield from _rope_incompatibilities(config)
    if config.to_dict().get("quantization_config"):
        yield "quantised weights: export the checkpoint before they were quantised, with --dtype q8_0"


def add_language_model(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """Write the settings of a language model, without its vocabulary."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    _add_rope(writer, config)
    ARCHITECTURES[config.model_type].add_settings(writer, config)


def plan_language_model(
    config: PreTrainedConfig, weights: dict[str, tuple[str, tuple[int, ...]]], wanted: StoredType
) -> Iterator[PlannedTensor]:
    """Yield the tensors of the language model's file.

    Args:
        config: its configuration.
        weights: transformers' name -> the name in the checkpoint, and the shape.
        wanted: how matrices are stored.

    Raises:
        ValueError: llama.cpp has no name for a weight.
    """
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    if (factors := _rope_factors(config)) is not None:
        yield PlannedTensor("rope_freqs.weight", None, tuple(factors.shape), StoredType.F32, value=factors)
    for theirs, (source, shape) in weights.items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"llama.cpp has no name for the weight {theirs}")
        change = architecture.make_change(theirs, config)
        yield PlannedTensor(name, source, shape, choose_stored_type(name, shape, wanted), change)


# Settings


def _add_rms(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_heads(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    _add_rms(writer, config)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))


def _add_phi(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _add_phi3(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    _add_rms(writer, config)
    writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    writer.add_sliding_window(0)  # none: the window is not exceeded, see `_context_length`


def _add_gemma2(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    _add_heads(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _add_gemma3(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    _add_heads(writer, config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _context_length(config: PreTrainedConfig) -> int:
    """Return the most positions that llama.cpp computes as transformers does.

    llama.cpp's Llama, Qwen and Phi attend to everything; up to the length of a window that is the same.
    """
    positions, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if config.model_type.startswith("gemma") or not window or not getattr(config, "use_sliding_window", True):
        return positions
    return min(positions, window)


# Positions


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotary settings, of layers that attend to everything where there are others."""
    values = config.rope_parameters or {}
    return values.get("full_attention", values)


def _rope_incompatibilities(config: PreTrainedConfig) -> Iterator[str]:
    kind = _rope(config).get("rope_type", "default")
    allowed = ("default", "linear", "yarn", "llama3") if config.model_type == "llama" else ("default", "linear", "yarn")
    if kind not in allowed:
        yield f"a {config.model_type} with rope_type={kind}: possible are {', '.join(allowed)}"
    known = {
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        *(("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()),
    }
    if further := sorted(key for key, value in _rope(config).items() if key not in known and value is not None):
        yield f"rope_parameters with {', '.join(further)}: llama.cpp takes {', '.join(sorted(known))}"
    local = (config.rope_parameters or {}).get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        yield f"a window with rope_type={local['rope_type']}: llama.cpp has the default"


def _add_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    values = _rope(config)
    share = values.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    writer.add_rope_dimension_count(int(head_dim(config) * share))
    writer.add_rope_freq_base(values.get("rope_theta", 10000.0))
    if (kind := values.get("rope_type", "default")) in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(values["factor"])
        if original := values.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)


def _rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """Return what llama.cpp divides frequencies by, `(head_dim / 2,)`, where a formula of Llama 3 scales them."""
    values = _rope(config)
    if values.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_dim(config)
    plain = 1.0 / values["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled


# Weights


def _interleave_heads(name: str, config: PreTrainedConfig) -> Change:
    """llama.cpp's Llama rotates neighbouring channels, transformers' the two halves of a head."""
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads or config.num_attention_heads
    else:
        return AS_IT_IS

    def interleave(tensor: Tensor) -> Tensor:
        """Move the channels of transformers' order into llama.cpp's order."""
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def divide(tensor: Tensor) -> Tensor:
        """Move the channels of llama.cpp's order into transformers' order."""
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    return Change(interleave, divide)


def _add_one_to_norms(name: str, config: PreTrainedConfig) -> Change:
    """Gemma's norms multiply by one more than their weight; llama.cpp's by the weight."""
    return Change(lambda tensor: tensor + 1, lambda tensor: tensor - 1) if name.endswith("norm.weight") else AS_IT_IS


def _unchanged(name: str, config: PreTrainedConfig) -> Change:
    return AS_IT_IS


# What has no place


def _any(config: PreTrainedConfig) -> Iterator[str]:
    yield from ()


def _qwen_incompatibilities(config: PreTrainedConfig) -> Iterator[str]:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.use_sliding_window and len(kinds) > 1:
        yield f"a {config.model_type} with use_sliding_window=true: llama.cpp attends to everything"


def _phi_incompatibilities(config: PreTrainedConfig) -> Iterator[str]:
    if config.qk_layernorm:
        yield "a phi with qk_layernorm=true: llama.cpp has none"


def _gemma_incompatibilities(config: PreTrainedConfig) -> Iterator[str]:
    if not config.tie_word_embeddings:
        yield f"a {config.model_type} with tie_word_embeddings=false: llama.cpp's head is its embeddings"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    expected = head_dim(config)
    if config.num_hidden_layers == LARGEST_GEMMA.get(config.model_type):
        expected = config.hidden_size // config.num_attention_heads
    if scalar is not None and scalar != expected:
        yield f"a {config.model_type} with query_pre_attn_scalar={scalar}: llama.cpp has {expected}"
    period = {"gemma2": 2, "gemma3_text": GEMMA3_PERIOD}.get(config.model_type)
    if period is not None:
        kinds = [
            "full_attention" if number % period == period - 1 else "sliding_attention"
            for number in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != kinds:
            yield f"a {config.model_type} with layer_types={config.layer_types}: llama.cpp has {kinds}"
    if config.attention_bias:
        yield f"a {config.model_type} with attention_bias=true: llama.cpp has none"


LLAMA = Architecture(gguf.MODEL_ARCH.LLAMA, _add_heads, _any, _interleave_heads)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, _add_rms, _qwen_incompatibilities, _unchanged),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, _add_heads, _qwen_incompatibilities, _unchanged),
    "phi": Architecture(gguf.MODEL_ARCH.PHI2, _add_phi, _phi_incompatibilities, _unchanged),
    "phi3": Architecture(gguf.MODEL_ARCH.PHI3, _add_phi3, _any, _unchanged),
    "gemma": Architecture(gguf.MODEL_ARCH.GEMMA, _add_heads, _gemma_incompatibilities, _add_one_to_norms),
    "gemma2": Architecture(gguf.MODEL_ARCH.GEMMA2, _add_gemma2, _gemma_incompatibilities, _add_one_to_norms),
    "gemma3_text": Architecture(gguf.MODEL_ARCH.GEMMA3, _add_gemma3, _gemma_incompatibilities, _add_one_to_norms),
}
"""`model_type` of transformers -> llama.cpp's architecture."""

ACTIVATIONS = {
    "llama": "silu",
    "mistral": "silu",
    "qwen2": "silu",
    "qwen3": "silu",
    "phi": "gelu_new",
    "phi3": "silu",
    "gemma": "gelu_pytorch_tanh",
    "gemma2": "gelu_pytorch_tanh",
    "gemma3_text": "gelu_pytorch_tanh",
}
"""`model_type` -> the one activation that llama.cpp has for it."""
