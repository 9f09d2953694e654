"""What is wrong with the parts of a composed model: its encoders, its connector, its tiles.

`vlm.assembly.encoders`, which has the encoders' configurations, checks whether several encoders fit together. Imports
the schema only.
"""

from collections.abc import Iterator
from pathlib import Path

from vlm.checks.fields import format_value
from vlm.config.model_schema import EncoderConfig
from vlm.config.named import is_custom_name
from vlm.config.packaged import packaged_connectors
from vlm.config.schema import RunConfig


def encoder_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the encoders of a run."""
    first = config.model.visual_encoder
    yield from _layer_problems("model.visual_encoder", first)
    for index, encoder in enumerate(first.extra_encoders):
        key = f"model.visual_encoder.extra_encoders.{index}"
        if encoder.hf_name.startswith(("/", "./", "../", "~")) and not Path(encoder.hf_name).is_dir():
            yield f"{key}.hf_name={encoder.hf_name}: no such folder (seen from {Path.cwd()})"
        yield from _layer_problems(key, encoder)


def _layer_problems(key: str, encoder: EncoderConfig) -> Iterator[str]:
    layer: object = encoder.feature_layer
    layers = layer if isinstance(layer, list) else [layer]
    if not layers or (layer is not None and not all(type(number) is int for number in layers)):
        yield f"{key}.feature_layer={layer}: a whole number is needed, a list of them, or null for the encoder's output"


def connector_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with a connector: a packaged one is allowed with its options, or `package.module:Class`."""
    connector, packaged = config.model.connector, packaged_connectors()
    if (allowed := packaged.get(connector.type)) is not None:
        for name, value in connector.options.items():
            if value is not None and name not in allowed:
                key = f"model.connector.options.{name}"
                yield (
                    f"{key}={format_value(value)}: {connector.type} does not take it; {key}=null leaves it out. "
                    f"Allowed: {', '.join(allowed) or 'none'}"
                )
    elif not is_custom_name(connector.type):
        names = ", ".join(packaged)
        yield f"model.connector.type={connector.type}: allowed are {names}, or package.module:Class for your own"


def unproved_problems(config: RunConfig) -> Iterator[str]:
    """Yield `model.unproved` if it has no effect."""
    if config.model.unproved and config.model.hf_name is None and not config.trainer.from_pretrained:
        yield (
            "model.unproved=true: it is for whole models (model.hf_name), which are tried on a small model first; "
            "leave it out"
        )


def anyres_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the grids of tiles, and what contradicts them."""
    anyres = config.model.anyres
    for grid in anyres.grids or []:
        if len(grid) != 2 or min(grid) < 1:
            yield f"model.anyres.grids: {list(grid)} is not a grid; [rows, columns] is needed"
    if not anyres.grids and (anyres.max_tiles is not None or anyres.tile_several):
        yield "model.anyres: max_tiles and tile_several need grids, as in model/anyres=llava-next"
    if not anyres.grids:
        return
    if (name := config.model.hf_name) is not None:
        yield f"model.anyres.grids: model.hf_name={name} prepares images itself; choose model/anyres=none"
    if config.dataset.image_mode == "pad":
        yield (
            "dataset.image_mode=pad: with model.anyres, an image is squashed to a square as a whole and its tiles are "
            "padded with black; set dataset.image_mode=square, or model/anyres=none"
        )


def check_no_image_mode(image_mode: str | None, name: str) -> None:
    """Raise ValueError if a whole model is told how to prepare images."""
    if image_mode is not None:
        raise ValueError(
            f"dataset.image_mode={image_mode}: {name} prepares images itself; leave dataset.image_mode=null"
        )
