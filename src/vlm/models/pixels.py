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

from .anyres import FRAME, AnyRes

Picture = Image.Image | torch.Tensor
"""Pillow's, or whole numbers `(3, height, width)`."""


def raw_of(steps: Any, pictures: Sequence[Picture], image_mode: str) -> torch.Tensor:
    """Pictures in RGB as `(images, 3, height, width)`: whole numbers from an image processor that `is_plain`.

    Others do all that they do, and give what the encoder reads.
    """
    if image_mode == "pad":
        pictures = [pad_to_square(picture, mean_colour(steps)) for picture in pictures]
    if not is_plain(steps):
        return steps(pictures, return_tensors="pt")["pixel_values"]
    return torch.stack([resized(steps, picture) for picture in pictures])


def resized(steps: Any, picture: Picture) -> torch.Tensor:
    """The image processor's own resizing and cropping, without what its call does around them."""
    pixels = picture if isinstance(picture, torch.Tensor) else as_tensor(picture)
    if steps.do_resize:
        pixels = steps.resize(pixels, steps.size, resample=steps.resample)
    if steps.do_center_crop:
        pixels = steps.center_crop(pixels, steps.crop_size)
    return pixels


def normalised(steps: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Whole numbers as the encoder reads them, on the device where they are; other pixels are normalised already."""
    if pixels.dtype != torch.uint8:
        return pixels
    mean, std = tuple(steps.image_mean), tuple(steps.image_std)
    return steps.rescale_and_normalize(pixels, True, steps.rescale_factor, True, mean, std)


def views_of(steps: Any, tiling: AnyRes, picture: torch.Tensor, number: int) -> torch.Tensor:
    """What the encoder sees of a picture: `(3, height, width) -> (views, 3, tile_size, tile_size)`.

    The whole is squashed to a square, or, where it is one of several, padded to one in the mean colour; a frame is
    squashed.
    """

    def resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return steps.resize(pixels, SizeDict(height=height, width=width), resample=steps.resample)

    side = tiling.tile_size
    if number not in (FRAME, 1):
        return torch.cat([resize(picture, side, side)[None], tiling.cut(picture, resize)])
    return resize(picture if number == FRAME else pad_to_square(picture, mean_colour(steps)), side, side)[None]


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


def image_processor_of(given: Any) -> Any:
    """An image processor, as it is or out of what its `to_dict` gave."""
    if not isinstance(given, dict):
        return given
    return get_image_processor_class_from_name(given["image_processor_type"]).from_dict(given)


def mean_colour(steps: Any) -> tuple[int, ...]:
    """What normalises to all but zero, in whole numbers."""
    return tuple(int(mean * 255) for mean in steps.image_mean)


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


def as_pictures(images: Any) -> list[Image.Image]:
    """Pictures as Pillow's: out of one, or lists, of paths, addresses, base64 texts, arrays and Pillow's own."""
    if isinstance(images, (list, tuple)):
        return [picture for image in images for picture in as_pictures(image)]
    return [load_image(images) if isinstance(images, str) else to_pil_image(images)]
