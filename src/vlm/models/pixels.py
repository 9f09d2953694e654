"""Images as a visual encoder reads them: upright, in RGB, padded, resized, normalised.

Hub code: imports torch, numpy, Pillow, transformers and its siblings only.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import SizeDict, load_image
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from .anyres import AnyRes

ImageOrTensor = Image.Image | Tensor
"""An image of Pillow, or a uint8 tensor `(3, height, width)`."""

ALPHA_BACKGROUNDS: dict[str, tuple[int, int, int] | None] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "drop": None,
}
"""Name of a background -> its colour; None: transparency is ignored, whatever colour lies below it is seen."""
LEVEL_BITS = (8, 10, 12, 14, 16)
"""Bits a level that sensors and files have."""
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF: bits of each channel; 0 where 0 is white; 1 for whole numbers without a sign."""

Settings = dict[str, Any]
"""Settings by name, as JSON holds them."""


class ImageProcessor(Protocol):
    """The interface shared by the image processors of transformers, which declare no types of their own.

    `size` and `crop_size` are a `SizeDict` or a mapping with `height` and `width`, or `shortest_edge`.
    """

    do_resize: bool
    do_center_crop: bool
    do_rescale: bool
    do_normalize: bool
    size: Any
    crop_size: Any
    resample: int
    rescale_factor: float
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __call__(self, images: Sequence[ImageOrTensor], *, return_tensors: str) -> Mapping[str, Tensor]:
        """Return the model's inputs for a batch of images."""
        ...

    def resize(self, image: Tensor, size: Any, *, resample: int) -> Tensor:
        """Resize an image `(3, height, width)`."""
        ...

    def center_crop(self, image: Tensor, size: Any) -> Tensor:
        """Cut the middle out of an image `(3, height, width)`."""
        ...

    def rescale_and_normalize(
        self,
        images: Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> Tensor:
        """Turn whole numbers into what the encoder reads, `(pixels * rescale_factor - mean) / std`; the shape stays."""
        ...

    def to_dict(self) -> Settings:
        """Return the settings."""
        ...


def make_raw_pixels(image_processor: ImageProcessor, rgb_images: Sequence[ImageOrTensor], image_mode: str) -> Tensor:
    """Return RGB images as `(images, 3, height, width)`: uint8 from an image processor that `is_plain`.

    All other image processors do all of their work here and return what the encoder reads.

    Args:
        image_processor: one visual encoder's.
        rgb_images: Pillow images; for one that `is_plain`, uint8 tensors `(3, height, width)` too.
        image_mode: `pad` pads each to a square in the mean colour first; `square` does not.
    """
    if image_mode == "pad":
        rgb_images = [pad_to_square(rgb_image, mean_color_value(image_processor)) for rgb_image in rgb_images]
    if not is_plain(image_processor):
        return image_processor(rgb_images, return_tensors="pt")["pixel_values"]
    return torch.stack([_resize_and_crop(image_processor, as_tensor(rgb_image)) for rgb_image in rgb_images])


def _resize_and_crop(image_processor: ImageProcessor, pixels: Tensor) -> Tensor:
    if image_processor.do_resize:
        pixels = image_processor.resize(pixels, image_processor.size, resample=image_processor.resample)
    if image_processor.do_center_crop:
        pixels = image_processor.center_crop(pixels, image_processor.crop_size)
    return pixels


def normalise_pixels(image_processor: ImageProcessor, pixels: Tensor) -> Tensor:
    """Rescale and normalise uint8 pixels, `(images, 3, height, width)`, on the device where they are; shape kept.

    Other pixels are normalised already, and returned unchanged.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
    return image_processor.rescale_and_normalize(pixels, True, image_processor.rescale_factor, True, mean, std)


def make_views(image_processor: ImageProcessor, tiling: AnyRes, rgb_image: Tensor, num_views: int) -> Tensor:
    """Return what the encoder sees of an image: `(3, height, width) -> (views, 3, tile_size, tile_size)`.

    The whole image is squashed to a square, or, where it is one of several in a sample, padded to a square in the
    mean colour; a frame of a video is squashed.
    """

    def resize(pixels: Tensor, height: int, width: int) -> Tensor:
        """Resize an image, `(3, height, width)`, as the image processor does."""
        return image_processor.resize(pixels, SizeDict(height=height, width=width), resample=image_processor.resample)

    if num_views == 1:
        rgb_image = _pad_tensor_to_square(rgb_image, mean_color_value(image_processor))
    whole = resize(rgb_image, tiling.tile_size, tiling.tile_size)[None]
    return torch.cat([whole, tiling.cut_tiles(rgb_image, resize)]) if num_views > 1 else whole


def is_plain(image_processor: ImageProcessor) -> bool:
    """Return whether an image processor resizes, crops, rescales and normalises, and does nothing else."""
    methods = [getattr(type(image_processor), name, None) for name in ("_preprocess", "preprocess")]
    modules = {getattr(method, "__module__", "").rpartition(".")[2] for method in methods}
    is_inherited = modules <= {"image_processing_backends", "image_processing_utils"}
    pads = getattr(image_processor, "do_pad", None)
    return bool(is_inherited and not pads and image_processor.do_rescale and image_processor.do_normalize)


def make_image_processor(settings: ImageProcessor | Settings) -> ImageProcessor:
    """Make an image processor from what its `to_dict` returned; return an image processor unchanged."""
    if not isinstance(settings, dict):
        return settings
    made: Any = get_image_processor_class_from_name(settings["image_processor_type"]).from_dict(settings)
    return made


def mean_color_value(image_processor: ImageProcessor) -> tuple[int, ...]:
    """Return the colour that normalises to about zero, as whole numbers from 0 to 255."""
    return tuple(int(mean * 255) for mean in image_processor.image_mean)


def as_rgb(image: Image.Image, alpha_background: str = "white") -> Image.Image:
    """Return an image upright and in RGB, transparent parts on a background, deep levels scaled to 8 bits.

    Args:
        image: any image that Pillow opens, see `scale_levels` for those of more than 8 bits a channel.
        alpha_background: a name of `ALPHA_BACKGROUNDS`.
    """
    image.load()  # a TIFF is turned upright as it loads, and keeps its tags only then
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    colour = ALPHA_BACKGROUNDS[alpha_background]
    if image.mode[0] in "IF":
        rgb_image = scale_levels(image).convert("RGB")
        if colour is not None and isinstance(level := image.info.get("transparency"), int):
            rgb_image.paste(colour, mask=Image.fromarray(np.asarray(image) == level))
        return rgb_image
    if colour is None or not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, colour)
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def scale_levels(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 bits, 32 bits or floats with levels from 0 to 255, by a rule that the image decides.

    - Floats from 0 to 1: 1 is white.
    - Whole numbers from 0 to 65535: white is the highest level of as many bits as the file declares for a pixel, where
      those are not all of its bytes (a TIFF of 12 bits); else of the fewest of `LEVEL_BITS` that hold the lightest
      pixel, since files of 16 bits often hold levels of 12, and those of 32 bits levels of 8.
    - Others (below zero, above 65535, other floats): from the darkest pixel to the lightest.

    What is no number is black. A TIFF that declares 0 as white is inverted, which Pillow does for 8 bits only.
    """
    levels = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(TIFF_BITS) == (32,) and tags.get(TIFF_SAMPLE_FORMAT, (1,)) == (1,):
        levels = levels.view(np.uint32)  # Pillow reads them as numbers with a sign
    levels = levels.astype(np.float64)
    finite = levels[np.isfinite(levels)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    is_float = image.mode.startswith("F")
    black, white = low, high
    if is_float and low >= 0 and high <= 1:
        black, white = 0.0, 1.0
    elif not is_float and low >= 0 and high < 2 ** LEVEL_BITS[-1]:
        declared = [bits for bits in tags.get(TIFF_BITS, ()) if bits % 8]
        bits = next(bits for bits in (*declared, *LEVEL_BITS) if high < 2**bits)
        black, white = 0.0, float(2**bits - 1)
    scaled = (np.nan_to_num(levels, nan=black, posinf=white, neginf=black) - black) * (255 / ((white - black) or 1))
    grey = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(TIFF_PHOTOMETRIC) == 0 else grey)


def as_tensor(image: ImageOrTensor) -> Tensor:
    """Return an RGB image as `(3, height, width)`, channels last in memory: torchvision resizes that layout fastest."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pad_to_square(image: ImageOrTensor, colour: tuple[int, ...]) -> ImageOrTensor:
    """Return the image in the middle of a square of its longer side, as LLaVA-1.5 prepares it."""
    if isinstance(image, Tensor):
        return _pad_tensor_to_square(image, colour)
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _pad_tensor_to_square(image: Tensor, colour: tuple[int, ...]) -> Tensor:
    _, height, width = image.shape
    side = max(height, width)
    padded = image.new_tensor(colour).repeat(side, side, 1).permute(2, 0, 1)  # (3, side, side), channels last in memory
    top, left = (side - height) // 2, (side - width) // 2
    padded[:, top : top + height, left : left + width] = image
    return padded


def load_images(images: Any) -> list[Image.Image]:
    """Load images into Pillow, from one or nested lists of paths, URLs, base64 texts, arrays and Pillow images."""
    if isinstance(images, (list, tuple)):
        return [rgb_image for image in images for rgb_image in load_images(image)]
    if isinstance(images, str) and os.path.isfile(images):
        with Image.open(images) as image:  # `load_image` would ignore transparency and clip deep levels
            if image.format == "EPS":  # decoding it would start Ghostscript
                raise ValueError(f"{images}: PostScript is not read; save it as PNG or JPEG")
            image.load()  # so that the file is not kept open
            return [image]
    return [load_image(images) if isinstance(images, str) else to_pil_image(images)]
