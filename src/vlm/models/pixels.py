"""Pictures as a visual encoder reads them: upright, in RGB, padded, resized, normalised.

Hub code: imports torch, numpy, Pillow and transformers only. `steps` is an image processor of transformers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_transforms import to_pil_image
from transformers.image_utils import SizeDict, load_image
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from .anyres import VIDEO_FRAME_VIEWS, AnyRes

ImageRef = Image.Image | torch.Tensor
"""Pillow's, or whole numbers `(3, height, width)`."""


def make_raw_pixels(image_processor: Any, rgb_images: Sequence[ImageRef], image_mode: str) -> torch.Tensor:
    """Pictures in RGB as `(images, 3, height, width)`: whole numbers from an image processor that `is_plain`.

    Others do all that they do, and give what the encoder reads.
    """
    if image_mode == "pad":
        rgb_images = [pad_to_square(rgb_image, mean_color_value(image_processor)) for rgb_image in rgb_images]
    if not is_plain(image_processor):
        return image_processor(rgb_images, return_tensors="pt")["pixel_values"]
    return torch.stack([resize_and_crop(image_processor, rgb_image) for rgb_image in rgb_images])


def resize_and_crop(image_processor: Any, rgb_image: ImageRef) -> torch.Tensor:
    """The image processor's own resizing and cropping, without what its call does around them."""
    pixels = rgb_image if isinstance(rgb_image, torch.Tensor) else as_tensor(rgb_image)
    if image_processor.do_resize:
        pixels = image_processor.resize(pixels, image_processor.size, resample=image_processor.resample)
    if image_processor.do_center_crop:
        pixels = image_processor.center_crop(pixels, image_processor.crop_size)
    return pixels


def normalise_pixels(image_processor: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Whole numbers as the encoder reads them, on the device where they are; other pixels are normalised already."""
    if pixels.dtype != torch.uint8:
        return pixels
    mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
    return image_processor.rescale_and_normalize(pixels, True, image_processor.rescale_factor, True, mean, std)


def make_views(image_processor: Any, tiling: AnyRes, rgb_image: torch.Tensor, num_views: int) -> torch.Tensor:
    """What the encoder sees of a picture: `(3, height, width) -> (views, 3, tile_size, tile_size)`.

    The whole is squashed to a square, or, where it is one of several, padded to one in the mean colour; a frame is
    squashed.
    """

    def resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return image_processor.resize(pixels, SizeDict(height=height, width=width), resample=image_processor.resample)

    side = tiling.tile_size
    if num_views not in (VIDEO_FRAME_VIEWS, 1):
        return torch.cat([resize(rgb_image, side, side)[None], tiling.cut_tiles(rgb_image, resize)])
    return resize(
        rgb_image if num_views == VIDEO_FRAME_VIEWS else pad_to_square(rgb_image, mean_color_value(image_processor)),
        side,
        side,
    )[None]


def is_plain(image_processor: Any) -> bool:
    """Whether an image processor resizes, crops, rescales and normalises, and does nothing else."""
    kind = type(image_processor)
    inherited = getattr(kind, "_preprocess", None), getattr(kind, "preprocess", None)
    modules = {getattr(method, "__module__", "").rpartition(".")[2] for method in inherited}
    return (
        modules <= {"image_processing_backends", "image_processing_utils"}
        and not getattr(image_processor, "do_pad", None)
        and bool(image_processor.do_rescale and image_processor.do_normalize)
    )


def make_image_processor(given: Any) -> Any:
    """An image processor, as it is or out of what its `to_dict` gave."""
    if not isinstance(given, dict):
        return given
    return get_image_processor_class_from_name(given["image_processor_type"]).from_dict(given)


def mean_color_value(image_processor: Any) -> tuple[int, ...]:
    """What normalises to all but zero, in whole numbers."""
    return tuple(int(mean * 255) for mean in image_processor.image_mean)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture upright and in RGB; of 16 bits a channel, the upper 8 are kept, which Pillow would cut off at 255."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return image.convert("RGB")


def as_tensor(image: Image.Image) -> torch.Tensor:
    """A picture in RGB as `(3, height, width)`, but pixel by pixel in memory, as Pillow has it.

    torchvision resizes that fastest.
    """
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pad_to_square(image: Any, colour: tuple[int, ...]) -> Any:
    """The image, Pillow's or a tensor, in the middle of a square of its longer side, as LLaVA-1.5 prepares it."""
    if isinstance(image, torch.Tensor):
        _, height, width = image.shape
        side = max(height, width)
        padded = image.new_tensor(colour).repeat(side, side, 1).permute(2, 0, 1)  # (3, side, side), pixel by pixel
        top, left = (side - height) // 2, (side - width) // 2
        padded[:, top : top + height, left : left + width] = image
        return padded
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def load_images(images: Any) -> list[Image.Image]:
    """Pictures as Pillow's: out of one, or lists, of paths, addresses, base64 texts, arrays and Pillow's own."""
    if isinstance(images, (list, tuple)):
        return [rgb_image for image in images for rgb_image in load_images(image)]
    return [load_image(images) if isinstance(images, str) else to_pil_image(images)]
