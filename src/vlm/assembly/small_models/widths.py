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

MAX_ACTIVE = 2
"""Experts that a token is sent to, at most."""
HEAD_CHOICES = (16, 32, 64)
ROTARY_LISTS = ("short_factor", "long_factor")
"""Factors of rotary positions: one for each frequency."""


def shrink_widths(config: PreTrainedConfig, sizes: Sizes) -> None:
    """Make a configuration narrow in place, nested ones left alone."""
    fields = get_fields(config)
    for name, value in fields.items():
        if is_int(value) and (experts := _experts(name, value, sizes)) is not None:
            setattr(config, name, experts)
    if sizes.width is None:
        return
    before = get_head_width(fields)
    head = choose_head_width(fields, before, sizes)
    for name, value in fields.items():
        if (new := _resize(name, value, fields, sizes, head)) is not None:
            setattr(config, name, new)
    _set_sums(config)
    if before and head != before:
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(rope := fields.get(name), dict):
                setattr(config, name, scale_rope(rope, head / before))


def choose_head_width(fields: Fields, before: int | None, sizes: Sizes) -> int:
    """Return the width of a small model's attention heads: the smallest that its rotary positions can be divided in."""
    if before is None:
        return sizes.head
    for head in HEAD_CHOICES:
        if head >= sizes.head and all(_fits(rope, head / before) for rope in _ropes(fields)):
            return head
    return before


def scale_rope(rope: Mapping[str, object], factor: float) -> dict[str, object]:
    """Return the parameters of rotary positions for heads that are `factor` times as wide."""
    scaled: dict[str, object] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            scaled[name] = scale_rope(value, factor)
        elif name == "mrope_section" and is_list(value):
            scaled[name] = scale_sections([item for item in value if is_int(item)], factor)
        elif name in ROTARY_LISTS and is_list(value):
            scaled[name] = list(value[: round(len(value) * factor)])
        else:
            scaled[name] = value
    return scaled


def scale_sections(sections: list[int], factor: float) -> list[int]:
    """Return sections of the rotary frequencies whose sum is `factor` times theirs, none of them empty."""
    total = round(sum(sections) * factor)
    scaled = [max(1, int(section * factor)) for section in sections]
    while (rest := total - sum(scaled)) != 0:
        errors = [section * factor - new for section, new in zip(sections, scaled, strict=True)]
        place = errors.index(max(errors)) if rest > 0 else scaled.index(max(scaled))
        scaled[place] += 1 if rest > 0 else -1
    return scaled


def _resize(name: str, value: object, fields: Fields, sizes: Sizes, head: int) -> object:
    """Return the small value of a field; None where it stays as it is."""
    if is_list(value):
        new = [_resize(name, item, fields, sizes, head) for item in value]
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
    if KEPT.search(name) or not WIDTHS.search(name) or sizes.width is None or value <= sizes.width:
        return None
    return sizes.width


def _num_heads(fields: Fields, sizes: Sizes, head: int) -> int:
    """Return the number of heads, which fill the width where the configuration does not give their own."""
    given = "head_dim" in fields or "d_kv" in fields or sizes.width is None
    return sizes.heads if given else max(1, min(sizes.heads, (sizes.width or head) // head))


def _key_value_heads(value: int, fields: Fields, heads: int) -> int:
    """Return as many key-value heads as there are heads where it was so, else half."""
    return min(value, heads if value == get_heads(fields) else max(1, heads // 2))


def _experts(name: str, value: int, sizes: Sizes) -> int | None:
    if EXPERTS.search(name):
        return min(value, sizes.experts)
    if ACTIVE_EXPERTS.search(name):
        return min(value, MAX_ACTIVE)
    if name in SPANS:
        return min(value, MAX_ACTIVE if name == SPANS[0] else 1)
    return None


def _set_sums(config: PreTrainedConfig) -> None:
    """Set widths that are sums of others."""
    fields = get_fields(config)
    rotary, other = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")
    if "qk_head_dim" in fields and isinstance(rotary, int) and isinstance(other, int):
        config.qk_head_dim = rotary + other
    indices = fields.get("intermediate_layers_indices")
    if "vision_output_dim" in fields and is_list(indices):
        width = fields.get("hidden_size")
        config.vision_output_dim = width * (1 + len(indices)) if isinstance(width, int) else None


def _ropes(fields: Fields) -> list[Mapping[str, object]]:
    """Return the parameters of rotary positions, those of each kind of layer on their own."""
    found: list[Mapping[str, object]] = []
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := fields.get(name), dict):
            found += [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return found


def _fits(rope: Mapping[str, object], factor: float) -> bool:
    sections = rope.get("mrope_section")
    if not is_list(sections):
        return True
    total = sum(number for number in sections if is_int(number)) * factor
    return total >= len(sections) and total == int(total)
