"""Images in tiles (anyres) as other code bases write them down, and as `model.anyres` has them.

The others name allowed sizes in pixels (`image_grid_pinpoints`) where we
name grids in tiles: transformers as `[height, width]`, the original as `[width, height]`, which decides between grids
that are equally good for an image.
"""

import ast
import math
import re

from transformers import LlavaNextImageProcessor, LlavaOnevisionImageProcessor, PreTrainedConfig

from vlm.config.model_schema import AnyResConfig
from vlm.hub.folders import JsonObject
from vlm.models.anyres import AnyRes

MAX_TILES_PATTERN = re.compile(r"anyres_max_(\d+)")
"""How LLaVA-OneVision writes `max_tiles`."""

UNTILED_ASPECT_RATIOS = (None, "square", "pad")
"""Values of the original's `image_aspect_ratio` that make one square of an image."""


def read_grids(name: str, sizes: object, tile: int) -> list[list[int]]:
    """Return grids of tiles for sizes in pixels: (rows, columns) for (height, width), or both the other way round."""
    shown = f"{name}: image_grid_pinpoints={sizes}"
    if not isinstance(sizes, list) or not sizes:
        raise ValueError(f"{shown}; expected a list of sizes in pixels")
    for size in sizes:
        if len(size) != 2 or any(length < tile or length % tile for length in size):
            raise ValueError(f"{shown}: {list(size)} is not a multiple of the visual encoder's {tile} pixels")
    return [[length // tile for length in size] for size in sizes]


def read_max_tiles(name: str, field: str, value: object) -> int:
    """Return `max_tiles` from a value such as `anyres_max_9`."""
    match = MAX_TILES_PATTERN.fullmatch(str(value))
    if match is None or int(match[1]) < 1:
        raise ValueError(f"{name}: {field}={value}; imported is anyres_max_<N>, such as anyres_max_9")
    return int(match[1])


def is_tiled(name: str, values: JsonObject) -> bool:
    """Return whether an original LLaVA reads images in tiles; refuses ways of arranging their tokens that we lack."""
    aspect, merge = values.get("image_aspect_ratio"), values.get("mm_patch_merge_type") or "flat"
    shown = f"{name} has image_aspect_ratio={aspect}, mm_patch_merge_type={merge}"
    if aspect in UNTILED_ASPECT_RATIOS:
        if merge != "flat":
            raise ValueError(f"{shown}: one square an image is imported with mm_patch_merge_type=flat")
        return False
    if aspect != "anyres" and not MAX_TILES_PATTERN.fullmatch(str(aspect)):
        raise ValueError(f"{shown}: imported are square, pad, anyres and anyres_max_<N>")
    if merge != "spatial_unpad":
        raise ValueError(
            f"{shown}: images in tiles are imported with mm_patch_merge_type=spatial_unpad, where the padding is cut "
            "off and a newline ends each row"
        )
    return True


def read_original(name: str, values: JsonObject, tile: int) -> AnyResConfig:
    """Return `model.anyres` of an original LLaVA that reads images in tiles.

    The first release tiles every image (`anyres`); those with a limit were trained with several as one square each.
    `tile` is the side of the images that the visual encoder reads, in pixels.
    """
    aspect = values["image_aspect_ratio"]
    grids = read_grids(name, _read_original_sizes(name, values.get("image_grid_pinpoints"), tile), tile)
    limit = None if aspect == "anyres" else read_max_tiles(name, "image_aspect_ratio", aspect)
    return AnyResConfig([[rows, columns] for columns, rows in grids], limit, tile_several=limit is None)


def _read_original_sizes(name: str, written: object, tile: int) -> object:
    """Return sizes in pixels from a list, a list in a string, or tiles in a string: `(1x1),...,(6x6)` is a range."""
    if not isinstance(written, str):
        return written
    tiles = [[int(number) for number in pair] for pair in re.findall(r"\((\d+)x(\d+)\)", written)]
    if tiles and "..." in written:
        (width, height), (last_width, last_height) = tiles[0], tiles[-1]
        tiles = [[w, h] for w in range(width, last_width + 1) for h in range(height, last_height + 1)]
    if tiles:
        return [[length * tile for length in size] for size in tiles]
    try:
        return [list(size) for size in ast.literal_eval(written)]
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"{name}: image_grid_pinpoints={written}; imported are a list of sizes, and (1x1),...,(6x6)"
        ) from error


def read_native(
    name: str, config: PreTrainedConfig, processor: LlavaNextImageProcessor | LlavaOnevisionImageProcessor, tile: int
) -> AnyResConfig:
    """Return `model.anyres` of transformers' `llava_next` or `llava_onevision`.

    The image processor cuts the tiles that the model puts together again, so both have to agree. `tile` is the side of
    the images that the visual encoder reads, in pixels.
    """
    sizes, cut = ([list(size) for size in source.image_grid_pinpoints] for source in (config, processor))
    if sizes != cut:
        raise ValueError(f"{name}: image_grid_pinpoints={sizes} of its model, but {cut} of its image processor")
    grids = read_grids(name, sizes, tile)
    if config.model_type == "llava_next":
        return AnyResConfig(grids, None, tile_several=True)
    return AnyResConfig(grids, read_max_tiles(name, "vision_aspect_ratio", config.vision_aspect_ratio))


def native_type(anyres: AnyRes) -> str | None:
    """Return which of transformers' models reads images in these tiles: `llava_next`, `llava_onevision` or None."""
    if not anyres.tile_several:
        return "llava_onevision"
    return None if limits_tiles(anyres) else "llava_next"


def limits_tiles(anyres: AnyRes) -> bool:
    """Return whether `max_tiles` is less than the number of tiles of the largest grid."""
    return anyres.max_tiles is not None and anyres.max_tiles < max(map(math.prod, anyres.grids))


def make_aspect_ratio(anyres: AnyRes) -> str:
    """Return `anyres` where nothing shrinks and every image is tiled, else `anyres_max_<N>`."""
    if anyres.tile_several and not limits_tiles(anyres):
        return "anyres"
    return f"anyres_max_{anyres.max_tiles or max(map(math.prod, anyres.grids))}"


def make_grid_pinpoints(anyres: AnyRes) -> list[list[int]]:
    """Return transformers' `image_grid_pinpoints`: `[height, width]` in pixels."""
    return [[rows * anyres.tile_size, columns * anyres.tile_size] for rows, columns in anyres.grids]
