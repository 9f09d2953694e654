"""Pictures on their way into a model: plain JPEGs go from file to tensor in one step, the rest through Pillow."""

from io import BytesIO
from typing import Any

import simplejpeg
import torch
from PIL import ExifTags, Image
from torch import Tensor

from vlm.data.sample import Picture, Sample
from vlm.data.vision.images import errors_named, open_picture, open_pictures

JPEG = b"\xff\xd8\xff"


def decoded(sample: Sample, processor: Any) -> list[Tensor | Image.Image]:
    """A sample's pictures, as tensors where the processor reads them and that is quicker.

    Raises:
        BadSample: one does not open.
    """
    if not processor.reads_tensors or any(picture.frame is not None for picture in sample.pictures):
        return list(open_pictures(sample))
    return [tensor_or_picture(picture, sample.id) for picture in sample.pictures]


def tensor_or_picture(picture: Picture, sample_id: str) -> Tensor | Image.Image:
    """A plain JPEG as `(3, height, width)` whole numbers, the very ones that Pillow reads; another as Pillow opens it.

    Raises:
        BadSample: it does not open.
    """
    with errors_named(picture, sample_id):
        assert picture.path is not None or picture.content is not None
        content = picture.path.read_bytes() if picture.content is None else picture.content  # pyright: ignore[reportOptionalMemberAccess]
        if content.startswith(JPEG) and _is_plain(content):
            try:
                return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
            except ValueError:
                pass  # Pillow forgives some damage, and says what is wrong with the rest
    return open_picture(Picture(picture.path, content), sample_id)


def _is_plain(content: bytes) -> bool:
    """Whether a JPEG is in colour, upright, and no bomb."""
    with Image.open(BytesIO(content)) as header:
        return header.mode == "RGB" and header.getexif().get(ExifTags.Base.Orientation, 1) == 1
