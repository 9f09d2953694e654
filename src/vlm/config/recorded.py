"""Reads configurations that a checkpoint or run directory has recorded, including those with earlier names of keys.

Imports the schema and msgspec only.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec

from vlm.config.model_schema import ModelConfig

Recipe = dict[str, Any]
"""A recorded `model` section."""

RENAMED_KEYS = {
    "model.visual_encoder.beside": "model.visual_encoder.extra_encoders",
    "model.head.beside": "model.head.extra_heads",
}
"""Earlier keys, which checkpoints may have recorded -> today's keys. A run that sets an earlier key is refused."""


def current_key(key: str) -> str:
    """Return today's name of a dotted key, or of a key below it."""
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def upgrade_recipe(recipe: Mapping[str, object]) -> Recipe:
    """Return a recorded `model` section with today's names of its keys."""
    return {
        section: {current_key(f"model.{section}.{name}").rpartition(".")[2]: value for name, value in values.items()}
        if isinstance(values, Mapping)
        else values
        for section, values in recipe.items()
    }


def read_recipe(recipe: Mapping[str, object]) -> ModelConfig:
    """Return the `model` section that a checkpoint recorded.

    Raises:
        ValueError: it has an unknown key, or a value of another type.
    """
    upgraded = upgrade_recipe(recipe)
    try:
        model = msgspec.convert(upgraded, ModelConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"ModelConfig: {error}") from error
    for key in _find_unknown_paths(upgraded, asdict(model)):
        raise ValueError(f"ModelConfig: there is no key {key}")
    return model


def _find_unknown_paths(mapping: object, known: object, path: str = "") -> list[str]:
    """Return the dotted paths of nested mappings that are not in other nested mappings."""
    if not (isinstance(mapping, Mapping) and isinstance(known, Mapping)):
        return []
    unknown = []
    for name, value in mapping.items():
        unknown += _find_unknown_paths(value, known[name], f"{path}{name}.") if name in known else [f"{path}{name}"]
    return unknown
