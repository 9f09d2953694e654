"""Which layers a small model keeps: one of every kind, in their order, and at least two."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from transformers import PreTrainedConfig

from vlm.assembly.small_models.fields import Fields, get_fields, get_int, is_int, is_list, walk

DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "layers", "n_layer")
"""The number of layers, by any of its names."""
OTHER_DEPTHS = re.compile(
    r"^(en|de)coder_layers$|^num_(de|en)coder_layers$|^num_global_layers$|_depth$|_num_hidden_layers$"
)
"""Numbers of layers in addition to a configuration's main ones."""
LISTS = re.compile(r"layer|types|pattern|idxs|indices|indexes|intermediate_size")
"""Fields that say something of each layer, or which layers are meant."""
LEADING = re.compile(r"^first_k|^num_dense_layers$|^n_dense")
"""How many of the first layers are of another kind."""
TRAILING = ("num_kv_shared_layers",)
"""How many of the last layers are of another kind."""
PERIODS = re.compile(r"_(step|interval|frequency)$|^sliding_window_pattern$")
"""Every how many layers one is of another kind."""
REFERENCES = re.compile(r"feature_layers?$|target_layers?$|^vit_layers$|layer_map$|^insert_layer_id$|vision_layer$")
"""Layers of another configuration, counted from the last one where negative."""
MIN_LAYERS = 2


def shrink_layers(config: PreTrainedConfig, references: Sequence[int] = ()) -> None:
    """Remove layers of a configuration in place, nested ones left alone.

    Args:
        config: the configuration.
        references: layers that others read: negative ones count from the last layer.
    """
    overrides = read_overrides(config)
    config.per_layer_config = None  # what is of a layer reads as what is of all, until it is set again
    fields = get_fields(config)
    for name, value in fields.items():
        if OTHER_DEPTHS.search(name) and isinstance(value, int):
            setattr(config, name, min(value, MIN_LAYERS))
    depths = fields.get("depths")
    if is_list(depths):
        config.depths = _like(depths, [1] * len(depths))
    name, depth = next(((name, depth) for name in DEPTHS if (depth := get_int(fields, name))), ("", 0))
    if not depth or is_list(depths):  # stages, each of its own width
        return
    kept = choose_layers(
        {**fields, "layer_overrides": _spread(overrides, depth)},
        depth,
        max([MIN_LAYERS, *(-layer for layer in references if layer < 0), len(list_targets(references))]),
    )
    setattr(config, name, len(kept))
    for field, value in fields.items():
        if (new := _cut(field, value, depth, kept)) is not None:
            setattr(config, field, new)
    if overrides:
        config.per_layer_config = {place: overrides[layer] for place, layer in enumerate(kept) if layer in overrides}


def read_overrides(config: PreTrainedConfig) -> dict[int, Fields]:
    """Return the fields that single layers have of their own: layer -> fields."""
    overrides = config.to_dict().get("per_layer_config") or {}
    return {int(layer): fields for layer, fields in overrides.items()}


def choose_layers(fields: Fields, depth: int, least: int) -> list[int]:
    """Return the layers that stay: the first of every kind, and enough of the first ones to be `least`."""
    kinds: dict[tuple[object, ...], int] = {}
    properties = list(_properties(fields, depth))
    for layer in range(depth):
        kinds.setdefault(tuple(of_layer(layer) for of_layer in properties), layer)
    kept = set(kinds.values())
    period = max([1, *(value for name, value in _ints(fields) if PERIODS.search(name) and value <= depth)])
    if period > 1:  # the kinds of layers follow from their numbers
        kept = set(range(max(*kept, period - 1, least - 1) + 1))
    for layer in range(depth):
        if len(kept) < min(least, depth):
            kept.add(layer)
    return sorted(kept)


def read_depth(config: PreTrainedConfig) -> int | None:
    """Return a configuration's number of layers; None if it has none."""
    return get_int(get_fields(config), *DEPTHS)


def read_references(config: PreTrainedConfig) -> list[int]:
    """Return the layers that a configuration, or one nested in it, reads of another one."""
    return [
        layer
        for nested in walk(config)
        for name, value in get_fields(nested).items()
        if REFERENCES.search(name)
        for layer in _flatten(value)
    ]


def list_targets(references: Sequence[int]) -> list[int]:
    """Return the layers that are referred to by their numbers from the first one, each once, in order."""
    return sorted({layer for layer in references if layer >= 0})


def fit_references(config: PreTrainedConfig, depth: int, references: Sequence[int] = ()) -> None:
    """Lower, in place, references to layers beyond `depth` ones; those that count from the last stay.

    Different layers stay different, as far as there are as many: `references` are those of the whole configuration.
    """
    targets = list_targets(references)
    places = {layer: place for place, layer in enumerate(targets)} if targets and targets[-1] >= depth else {}
    for name, value in get_fields(config).items():
        if REFERENCES.search(name):
            setattr(config, name, _map_ints(value, lambda layer: min(places.get(layer, layer), depth - 1)))


def _properties(fields: Fields, depth: int) -> Iterable[Callable[[int], object]]:
    for name, value in fields.items():
        if is_list(value) and _is_per_layer(name, value, depth):
            yield lambda layer, value=value: str(value[layer])
        elif is_list(value) and _is_layer_list(name, value, depth):
            yield lambda layer, value=value: layer in value
        elif LEADING.search(name) and isinstance(value, int):
            yield lambda layer, value=value: layer < value
        elif name in TRAILING and isinstance(value, int):
            yield lambda layer, value=value: layer >= depth - value


def _cut(name: str, value: object, depth: int, kept: Sequence[int]) -> object:
    """Return the value of a field for the layers that stay; None if it stays as it is."""
    if is_list(value):
        if _is_per_layer(name, value, depth):
            return _like(value, [value[layer] for layer in kept])
        if _is_layer_list(name, value, depth):
            return _like(value, [place for place, layer in enumerate(kept) if layer in value])
    elif is_int(value):
        if LEADING.search(name):
            return sum(layer < value for layer in kept)
        if name in TRAILING:
            return sum(layer >= depth - value for layer in kept)
    return None


def _is_per_layer(name: str, value: object, depth: int) -> bool:
    """Whether a field has a value for each layer."""
    listed = is_list(value) and len(value) == depth and bool(LISTS.search(name))
    return listed and not _is_layer_list(name, value, depth)


def _is_layer_list(name: str, value: object, depth: int) -> bool:
    """Whether a field lists numbers of layers, in ascending order."""
    if not is_list(value) or not value or not LISTS.search(name) or REFERENCES.search(name):
        return False
    numbers = [item for item in value if is_int(item) and 0 <= item < depth]
    return len(numbers) == len(value) and all(a < b for a, b in pairwise(numbers))


def _ints(fields: Mapping[str, object]) -> Iterable[tuple[str, int]]:
    return ((name, value) for name, value in fields.items() if is_int(value))


def _spread(overrides: Mapping[int, Fields], depth: int) -> list[object]:
    """Return the own fields of each layer, as a list of all layers."""
    return [str(overrides.get(layer)) for layer in range(depth)]


def _like(value: object, items: list[object]) -> object:
    return tuple(items) if isinstance(value, tuple) else items


def _flatten(value: object) -> Iterable[int]:
    if is_list(value):
        for item in value:
            yield from _flatten(item)
    elif is_int(value):
        yield value


def _map_ints(value: object, change: Callable[[int], int]) -> object:
    if is_list(value):
        return _like(value, [_map_ints(item, change) for item in value])
    return change(value) if is_int(value) else value
