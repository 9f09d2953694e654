"""What the fields of a configuration say, by the names that transformers' classes give them.

No rule here is of one model type: a type that was added yesterday follows the same names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from transformers import PreTrainedConfig

Fields = dict[str, object]
"""The fields of a configuration, by name."""

KEPT = re.compile(
    r"vocab|position|patch|window|kernel|merge_size|merger_times|stride|chunk|token|(^|_)ids?$|_index$|(in|num|out)_channels$|seq|length"
    r"|image_size|tile|canvas|pool|sampling|mel|temporal|max_|min_|grid|resolution|feature_size|block_size|img_size"
    r"|ssm_state|state_size|conv|altup|active|latent|buckets|distance|codebook_size|channel_multiplier"
)
"""Fields that pixels, tokens and positions depend on, and those of no weight: they keep their values."""
EXPERTS = re.compile(r"(^|_)(num|n)(_routed|_local)?_experts$")
ACTIVE_EXPERTS = re.compile(r"experts_per_tok(en)?$|^moe_(top)?k$|^num_selected_experts$|^top_k_experts$|^moe_top_k$")
KEY_VALUE_HEADS = re.compile(r"(key_value|kv)_heads$")
HEADS = re.compile(r"(^|_)heads$")
HEAD_WIDTHS = re.compile(r"head_dim$|dim_head$|^d_kv$")
WIDTHS = re.compile(
    r"hidden_sizes?|intermediate_size|ffn|mlp_size|(^|_)dims?($|_)|^d_(model|ff|inner)$|^n_(embd|inner)$|embed_dim|rank$"
    r"|(output|down\w*)_channels$|adapter\w*size|(in|out)\w*_dim$|^width$"
)
SPANS = {"n_group": 2, "topk_group": 1, "n_groups": 2}
"""Groups of experts, how many of them a token may choose from, and groups of states -> the most of them."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a small model.

    Attributes:
        width: of hidden states, and of everything as wide or wider.
        head: width of an attention head, at least.
        heads: number of attention heads, at most.
        experts: number of experts, at most.
    """

    width: int = 64
    head: int = 16
    heads: int = 4
    experts: int = 4


def walk(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and those nested in it, each once, the outer ones first."""
    waiting, known = [config], set[int]()
    while waiting:
        current = waiting.pop(0)
        if id(current) in known:
            continue
        known.add(id(current))
        yield current
        waiting += [value for value in vars(current).values() if isinstance(value, PreTrainedConfig)]


def get_fields(config: PreTrainedConfig) -> Fields:
    """Return the fields that a configuration stores, without nested ones and without other names of them."""
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and not isinstance(value, PreTrainedConfig)
    }


def is_int(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number; `True` and `False` are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Return whether a value is a list or a tuple."""
    return isinstance(value, (list, tuple))


def get_merge(fields: Mapping[str, object]) -> int:
    """Return how many patches a configuration makes one of; 1 if it does not say."""
    for name in ("spatial_merge_size", "merge_size", "merge_kernel_size"):
        side = fields.get(name)
        if is_list(side) and side:
            side = side[0]
        if is_int(side):
            return side**2
    ratio = fields.get("pixel_shuffle_ratio")
    return round(ratio**-2) if isinstance(ratio, float) else 1


def get_int(fields: Mapping[str, object], *names: str) -> int | None:
    """Return the first of these fields that is a whole number; None without any."""
    for name in names:
        value = fields.get(name)
        if is_int(value):
            return value
    return None


def get_width(fields: Mapping[str, object]) -> int | None:
    """Return the width of a configuration's hidden states."""
    return get_int(fields, "hidden_size", "d_model", "embed_dim", "n_embd", "dim")


def get_heads(fields: Mapping[str, object]) -> int | None:
    """Return a configuration's number of attention heads."""
    return get_int(
        fields, "num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads", "n_heads", "n_head"
    )


def get_head_width(fields: Mapping[str, object]) -> int | None:
    """Return the width of a configuration's attention heads: given, or the width of the model divided among them."""
    given = get_int(fields, "head_dim", "d_kv")
    width, heads = get_width(fields), get_heads(fields)
    return given or (width // heads if width and heads else None)
