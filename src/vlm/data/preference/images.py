"""Images for the rejected side that show less than those of the record: blank ones, or small crops."""

from collections.abc import Sequence
from hashlib import blake2b
from random import Random

from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from vlm.data.blank_images import make_blank_medium
from vlm.data.processor import Processor
from vlm.data.vision.images import Medium, upright_size
from vlm.data.vision.video import DecodedVideo

SAME, BLANK = "same", "blank"
"""Values of `trainer.preference.rejected_image`, besides `cropped`."""

MAX_AREA = 0.2
"""The largest share of an image's area that a crop keeps."""
MIN_AREA = 0.01
"""The smallest one: a crop has an area."""


def perturb_media(media: Sequence[Medium], how: str, processor: Processor, seed: str) -> list[Medium]:
    """Return images and videos of the same sizes that show less.

    Args:
        media: decoded images and videos.
        how: `blank`: in the processor's mean colour; `cropped`: a random part of the image, enlarged to its size.
        processor: the run's.
        seed: what chooses the crops, so that a record has the same ones in every epoch.
    """
    if how == BLANK:
        return [make_blank_medium(processor, _size(medium)) for medium in media]
    random = Random(blake2b(seed.encode("utf-8", "replace"), digest_size=8).digest())
    return [_crop(medium, (random.uniform(MIN_AREA, MAX_AREA), random.random(), random.random())) for medium in media]


def _size(medium: Medium):
    return medium.clip if isinstance(medium, DecodedVideo) else upright_size(medium)


def _crop(medium: Medium, place: tuple[float, float, float]) -> Medium:
    """Return a part of an image, or of all frames of a video; `place` is its share of the area, and where it is."""
    if isinstance(medium, DecodedVideo):
        return DecodedVideo([_crop_image(frame, place) for frame in medium.frames], medium.clip)
    return _crop_image(medium, place) if isinstance(medium, Image.Image) else _crop_tensor(medium, place)


def _crop_image(image: Image.Image, place: tuple[float, float, float]) -> Image.Image:
    top, left, bottom, right = _box(image.height, image.width, place)
    part = image.crop((left, top, right, bottom)).resize(image.size, Image.Resampling.BICUBIC)
    part.info = dict(image.info)
    if exif := image.getexif():  # the orientation
        part.info["exif"] = exif.tobytes()
    return part


def _crop_tensor(image: Tensor, place: tuple[float, float, float]) -> Tensor:
    """Return a part of an image `(3, height, width)` of uint8 in its size."""
    top, left, bottom, right = _box(image.shape[1], image.shape[2], place)
    part = image[None, :, top:bottom, left:right].float()
    whole = interpolate(part, tuple(image.shape[1:]), mode="bicubic", align_corners=False)[0]
    return whole.round().clamp(0, 255).to(image.dtype)


def _box(height: int, width: int, place: tuple[float, float, float]) -> tuple[int, int, int, int]:
    """Return the first row and column of a part, and those after it."""
    share, down, right = place
    rows, columns = max(round(height * share**0.5), 1), max(round(width * share**0.5), 1)
    top, left = round((height - rows) * down), round((width - columns) * right)
    return top, left, top + rows, left + columns
