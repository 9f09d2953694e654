"""What is wrong with `model.visual_encoder`, in words.

Imports the schema only. `check.py` raises the first of these problems; whether encoders fit together needs their
configurations, and is found out by `vlm.assembly.encoders`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.config.schema import EncoderConfig, RunConfig

FEATURE_STRATEGIES = ("patch", "cls+patch", "cls", "full")
"""A test holds them against the model's."""


def encoder_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the encoders of a run."""
    given = config.model.visual_encoder
    yield from _single_encoder_problems("model.visual_encoder", given)
    for index, one in enumerate(given.extra_encoders):
        key = f"model.visual_encoder.extra_encoders.{index}"
        if one.hf_name.startswith(("/", "./", "../", "~")) and not Path(one.hf_name).is_dir():
            yield f"{key}.hf_name={one.hf_name}: no such folder (seen from {Path.cwd()})"
        if one.feature_strategy not in FEATURE_STRATEGIES:
            yield f"{key}.feature_strategy={one.feature_strategy}: allowed are {', '.join(FEATURE_STRATEGIES)}"
        yield from _single_encoder_problems(key, one)


def _single_encoder_problems(key: str, encoder: EncoderConfig) -> Iterator[str]:
    layer: Any = encoder.feature_layer
    layers = layer if isinstance(layer, list) else [layer]
    if not layers or (layer is not None and not all(type(one) is int for one in layers)):
        yield f"{key}.feature_layer={layer}: a whole number is needed, a list of them, or null for the encoder's output"
    if encoder.image_size is not None and encoder.image_size < 1:
        yield f"{key}.image_size={encoder.image_size}: at least 1, or null, is needed"
