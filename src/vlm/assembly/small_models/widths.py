"""The widths of a small model: one for all hidden states, so that what was equally wide still is."""

from collections.abc import Mapping

from transformers import PreTrainedConfig

from vlm.assembly.small_models.fields import (
    ACTIVE_EXPERTS,
    EXPERTS,
    HEAD_WIDTHS,
    HEADS,
    KEPT,
    KEY_VALUE_HEADS,
    SPANS,
    WIDTHS,
    Fields,
    Sizes,
    get_fields,
    get_head_width,
    get_heads,
    is_int,
    is_list,
)
from vlm.assembly.small_models.layers import read_overrides
from vlm.assembly.small_models.rotary import ROPES, fits_head, iterate_ropes, scale_rope

MAX_ACTIVE = 2
"""Experts that a token is sent to, at most."""
PER_LAYER_WIDTH = 8
"""Width of an embedding that every layer has for every token."""
BASE_CHANNELS = 32
"""Channels of the first convolutions, which are normalised in so many groups."""
HEAD_CHOICES = (16, 32, 64)
TIMM_OPTIONS: dict[str, Fields] = {
    "mobilenetv5": {"channel_multiplier": 0.1},
    "fastvit": {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 16, 32, 32, 64), "cls_ratio": 1},
    "vit": {"embed_dim": 64, "depth": 2, "num_heads": 4},
}
"""Beginning of an architecture's name -> options that make it small: timm names architectures, it describes none."""


def shrink_widths(config: PreTrainedConfig, sizes: Sizes, merged: Mapping[int, int]) -> None:
    """Make a configuration narrow in place, nested ones left alone.

    Args:
        config: the configuration.
        sizes: the sizes of the small model.
        merged: widths of several patches in one vector -> how many those are.
    """
    overrides = read_overrides(config)
    config.per_layer_config = None  # what is of a layer reads as what is of all, until it is set again
    fields = get_fields(config)
    changed = narrow(fields, sizes, merged)
    for name, value in changed.items():
        setattr(config, name, value)
    if overrides:
        everywhere = {**fields, **changed}
        config.per_layer_config = {
            layer: _differences(own, {**fields, **own, **narrow({**fields, **own}, sizes, merged)}, everywhere)
            for layer, own in overrides.items()
        }


def narrow(fields: Fields, sizes: Sizes, merged: Mapping[int, int]) -> Fields:
    """Return the fields that change, with their new values."""
    changed: Fields = {}
    for name, value in fields.items():
        if is_int(value) and (experts := _experts(name, value, sizes)) is not None:
            changed[name] = experts
    if "architecture" in fields and "model_args" in fields:
        return changed | _narrow_timm(fields, sizes.width)
    before = get_head_width(fields)
    head = choose_head_width(fields, before, sizes)
    for name, value in fields.items():
        if (new := _resize(name, value, fields, sizes, head, merged)) is not None:
            changed[name] = new
    changed |= _sums(fields, {**fields, **changed})
    return changed | _narrow_ropes(fields, {**fields, **changed}, before)


def choose_head_width(fields: Fields, before: int | None, sizes: Sizes) -> int:
    """Return the width of a small model's attention heads: the smallest that its rotary positions can be divided in."""
    if before is None:
        return sizes.head
    for head in HEAD_CHOICES:
        if head >= sizes.head and all(fits_head(rope, head / before) for rope in iterate_ropes(fields)):
            return head
    return before


def _differences(own: Fields, layer: Fields, everywhere: Fields) -> Fields:
    """Return the fields that a layer has of its own, or with another value than the other layers."""
    return {
        name: value
        for name, value in layer.items()
        if name in own or (name not in ROPES and value != everywhere.get(name))
    }


def _narrow_timm(fields: Fields, width: int) -> Fields:
    """Return the options of a small visual encoder of timm."""
    name, arguments = str(fields["architecture"]), fields["model_args"]
    options = next((options for start, options in TIMM_OPTIONS.items() if name.startswith(start)), {})
    changed: Fields = {"model_args": {**(arguments if isinstance(arguments, dict) else {}), **options}}
    if "embed_dims" in options and is_int(fields.get("hidden_size")):
        changed["hidden_size"] = width
    return changed


def _narrow_ropes(fields: Fields, new: Fields, before: int | None) -> Fields:
    """Return the parameters of rotary positions for the new heads."""
    after = get_head_width(new)
    if not before or not after or before == after:
        return {}
    rotary, old_rotary = new.get("qk_rope_head_dim"), fields.get("qk_rope_head_dim")
    share = rotary / after if is_int(rotary) and is_int(old_rotary) and old_rotary != before else None
    return {
        name: scale_rope(rope, after / before, share) for name in ROPES if isinstance(rope := fields.get(name), dict)
    }


def _resize(name: str, value: object, fields: Fields, sizes: Sizes, head: int, merged: Mapping[int, int]) -> object:
    """Return the small value of a field; None if it stays as it is."""
    if is_list(value):
        new = [_resize(name, item, fields, sizes, head, merged) for item in value]
        items = [old if item is None else item for old, item in zip(value, new, strict=True)]
        return tuple(items) if isinstance(value, tuple) else items
    if not is_int(value) or value <= 1:
        return None
    if KEY_VALUE_HEADS.search(name):
        return _key_value_heads(value, fields, _num_heads(fields, sizes, head))
    if HEADS.search(name):
        return min(value, _num_heads(fields, sizes, head))
    if HEAD_WIDTHS.search(name):
        return head
    if name == "rotary_dim":
        before = get_head_width(fields)
        return round(value * head / before) if before else None
    if name == "base_channels":
        return min(value, BASE_CHANNELS)
    if KEPT.search(name) or not WIDTHS.search(name) or value <= sizes.width:
        return None
    return PER_LAYER_WIDTH if "per_layer" in name else sizes.width * merged.get(value, 1)


def _num_heads(fields: Fields, sizes: Sizes, head: int) -> int:
    """Return the number of heads, which fill the width where the configuration does not give their own."""
    given = is_int(fields.get("head_dim")) or "d_kv" in fields
    return sizes.heads if given else max(1, min(sizes.heads, sizes.width // head))


def _key_value_heads(value: int, fields: Fields, heads: int) -> int:
    """Return as many key-value heads as there are heads where it was so, else half."""
    return min(value, heads if value == get_heads(fields) else max(1, heads // 2))


def _experts(name: str, value: int, sizes: Sizes) -> int | None:
    if EXPERTS.search(name):
        return min(value, sizes.experts)
    if ACTIVE_EXPERTS.search(name):
        return min(value, MAX_ACTIVE)
    if name in SPANS:
        return min(value, SPANS[name])
    return None


def _sums(before: Fields, after: Fields) -> Fields:
    """Return widths that are sums or multiples of others."""
    changed: Fields = {}
    parts = ("qk_rope_head_dim", "qk_nope_head_dim")
    old = [number for name in parts if is_int(number := before.get(name))]
    new = [number for name in parts if is_int(number := after.get(name))]
    if len(old) == len(new) == len(parts):
        changed = {name: sum(new) for name in ("qk_head_dim", "head_dim") if before.get(name) == sum(old)}
    indices, width = after.get("intermediate_layers_indices"), after.get("hidden_size")
    if "vision_output_dim" in before and is_list(indices) and is_int(width):
        changed["vision_output_dim"] = width * (1 + len(indices))
    return changed | _channels_of_attention(before, after)


def _channels_of_attention(before: Fields, after: Fields) -> Fields:
    """Return the width of attention between convolutions, which is that of the last, widest ones."""
    factors = after.get("channel_multiplier")
    old, new, width = before.get("base_channels"), after.get("base_channels"), before.get("hidden_size")
    if not (is_list(factors) and factors and is_int(last := factors[-1]) and is_int(old) and is_int(new)):
        return {}
    return {"hidden_size": new * last} if width == old * last else {}
