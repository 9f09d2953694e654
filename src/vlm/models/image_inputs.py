"""The inputs of images that are more than pixels of one size: views in tiles, and patches at native resolution.

Hub code: imports torch and its siblings only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.image_utils import SizeDict

from .anyres import AnyRes, Size
from .native import NativeResolution, cut_patches
from .pixels import ImageProcessor, make_views


def make_tiled_inputs(
    processors: Sequence[ImageProcessor], tiling: AnyRes, rgb_images: Sequence[Tensor], sizes: Sequence[Size | None]
) -> dict[str, Tensor]:
    """Return the inputs of a sample's images in tiles, before normalisation.

    Args:
        processors: those of all visual encoders.
        tiling: how images are cut.
        rgb_images: uint8, `(3, height, width)` each.
        sizes: None for each image that is a frame of a video; without sizes, none is.

    Returns:
        `pixel_values` `(views, 3 * encoders, side, side)`, `image_sizes` `(images, 2)`, height and width in pixels, and
        `image_views` `(images,)`, how many views each image has.
    """
    image_sizes: list[Size] = [(rgb_image.shape[1], rgb_image.shape[2]) for rgb_image in rgb_images]
    frames = [size is None for size in sizes] or [False] * len(rgb_images)
    views = tiling.num_views([None if frame else size for frame, size in zip(frames, image_sizes, strict=True)])
    pixels = [
        torch.cat([make_views(processor, tiling, rgb_image, number) for processor in processors], dim=1)
        for rgb_image, number in zip(rgb_images, views, strict=True)
    ]
    return {
        "pixel_values": torch.cat(pixels),
        "image_sizes": torch.tensor(image_sizes),
        "image_views": torch.tensor(views),
    }


def make_native_inputs(
    processor: ImageProcessor, native: NativeResolution, rgb_images: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the inputs of images at native resolution, before normalisation.

    `pixel_values` `(patches, 3, side, side)` of all images, row by row, and `image_grids` `(images, 2)`, the rows and
    columns of patches of each. `rgb_images` are uint8, `(3, height, width)` each.
    """
    side, patches, grids = native.patch_size, [], []
    for rgb_image in rgb_images:
        rows, columns = native.grid((rgb_image.shape[1], rgb_image.shape[2]))
        size = SizeDict(height=rows * side, width=columns * side)
        patches.append(cut_patches(processor.resize(rgb_image, size, resample=processor.resample), side))
        grids.append((rows, columns))
    return {"pixel_values": torch.cat(patches).contiguous(), "image_grids": torch.tensor(grids)}
