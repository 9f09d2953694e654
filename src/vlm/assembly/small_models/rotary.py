"""Rotary positions of narrower attention heads."""

from collections.abc import Iterator, Mapping

from vlm.assembly.small_models.fields import Fields, is_int, is_list

ROPES = ("rope_parameters", "rope_scaling")
"""Fields that hold parameters of rotary positions, by kind of layer or of all layers."""
PER_FREQUENCY = ("short_factor", "long_factor")
"""Parameters with a value for each frequency."""


def iterate_ropes(fields: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield the parameters of rotary positions, those of each kind of layer on their own."""
    for name in ROPES:
        if isinstance(rope := fields.get(name), dict):
            yield rope
            yield from (value for value in rope.values() if isinstance(value, dict))


def fits_head(rope: Mapping[str, object], factor: float) -> bool:
    """Return whether sections of rotary frequencies can be divided where heads are `factor` times as wide."""
    sections = rope.get("mrope_section")
    if not is_list(sections):
        return True
    total = sum(number for number in sections if is_int(number)) * factor
    return total >= len(sections) and total == int(total)


def scale_rope(rope: Mapping[str, object], factor: float, rotary_share: float | None = None) -> Fields:
    """Return the parameters of rotary positions for narrower heads.

    Args:
        rope: the parameters, by kind of layer or of all layers.
        factor: the new width of a head, divided by the old one.
        rotary_share: the new `partial_rotary_factor`; None: as it was.
    """
    scaled: Fields = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            scaled[name] = scale_rope(value, factor, rotary_share)
        elif name == "mrope_section" and is_list(value):
            scaled[name] = scale_sections([item for item in value if is_int(item)], factor)
        elif name in PER_FREQUENCY and is_list(value):
            scaled[name] = list(value[: round(len(value) * factor)])
        elif name == "partial_rotary_factor" and rotary_share is not None:
            scaled[name] = rotary_share
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
