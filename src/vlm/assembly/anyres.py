"""Makes a composed model read images in tiles (`model.anyres`): checks its parts, and records the settings."""

import math
from dataclasses import asdict

from vlm.config.model_schema import AnyResConfig
from vlm.models.anyres import AnyRes
from vlm.models.configuration_vlm import VLMConfig
from vlm.models.connectors import keeps_grid
from vlm.models.pixels import is_plain
from vlm.models.processing_vlm import VLMProcessor


def resolve_anyres(config: VLMConfig, processor: VLMProcessor, requested: AnyResConfig, size: tuple[int, int]) -> None:
    """Write the settings of tiles into a composed model's configuration and processor; do nothing without grids.

    `size` is the height and width of the pixels that the visual encoder reads.
    """
    if requested.grids is not None:
        config.anyres = _anyres_fields(config, processor, requested, size) if requested.grids else None
        processor.anyres = config.anyres
        config.recipe["anyres"] = asdict(requested)
    if processor.anyres is not None and processor.image_mode != "square":
        raise ValueError(
            f"dataset.image_mode={processor.image_mode}: with model.anyres, dataset.image_mode=square is needed. "
            "An image is then squashed to a square as a whole, and its tiles are padded with black; if a sample has "
            "several images, each is padded to a square with the mean colour."
        )


def _anyres_fields(
    config: VLMConfig, processor: VLMProcessor, requested: AnyResConfig, size: tuple[int, int]
) -> dict[str, object]:
    """Return the fields of `AnyRes`; raises ValueError if the parts do not allow tiles."""
    if config.native is not None:
        raise ValueError(
            "model.anyres.grids: images are read at native resolution (dataset.image_mode=native), not in tiles"
        )
    kind, tokens = config.connector["type"], processor.tokens_per_image
    side = math.isqrt(tokens)
    patches = math.isqrt(config.num_patches)
    if not keeps_grid(kind) or side**2 != tokens:
        raise ValueError(
            f"model.anyres: the tokens of tiles are joined row by row, but the {tokens} tokens of a square that "
            f"model.connector.type={kind} makes form no grid. Choose another connector, such as mlp or pixel_shuffle, "
            "and model.visual_encoder.feature_strategy=patch; or model/anyres=none."
        )
    if config.num_features != config.num_patches or patches**2 != config.num_patches or size[0] != size[1]:
        raise ValueError(
            f"model.anyres: the visual encoder gives {config.num_features} features for {size[0]} x {size[1]} pixels, "
            f"{config.num_patches} of them patches; squares of patches alone are needed "
            "(model.visual_encoder.feature_strategy=patch)"
        )
    if not processor.accepts_tensors:
        name = next(type(steps).__name__ for steps in processor.image_processors if not is_plain(steps))
        raise ValueError(
            f"model.anyres: {name} does more with images than resizing and normalising; choose model/anyres=none"
        )
    grids = [list(grid) for grid in requested.grids or []]
    return vars(AnyRes(grids, size[0], side, requested.max_tiles, requested.tile_several))
