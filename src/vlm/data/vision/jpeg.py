"""Pictures on their way into a model: plain JPEGs go from file to tensor in one step, the rest through Pillow."""

from io import BytesIO
from typing import Any

import simplejpeg
import torch
from PIL import ExifTags, Image
from torch import Tensor

from vlm.data.sample import ImageRef, Sample
from vlm.data.vision.images import open_image, open_media, wrap_image_errors

JPEG = b"\xff\xd8\xff"


def decode_sample_images(sample: Sample, processor: Any) -> list[Tensor | Image.Image]:
    """A sample's pictures, as tensors where the processor reads them and that is quicker.

    Raises:
        BadSample: one does not open.
    """
    if not processor.accepts_tensors or any(image_ref.frame is not None for image_ref in sample.images):
        return list(open_media(sample))
    return [read_image_or_tensor(image_ref, sample.id) for image_ref in sample.images]


def read_image_or_tensor(image_ref: ImageRef, sample_id: str) -> Tensor | Image.Image:
    """A plain JPEG as `(3, height, width)` whole numbers, the very ones that Pillow reads; another as Pillow opens it.

    Raises:
        BadSample: it does not open.
    """
    with wrap_image_errors(image_ref, sample_id):
        assert image_ref.path is not None or image_ref.content is not None
        content = image_ref.path.read_bytes() if image_ref.content is None else image_ref.content  # pyright: ignore[reportOptionalMemberAccess]
        if content.startswith(JPEG) and _is_plain(content):
            try:
                return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
            except ValueError:
                pass  # Pillow forgives some damage, and says what is wrong with the rest
    return open_image(ImageRef(image_ref.path, content), sample_id)


def _is_plain(content: bytes) -> bool:
    """Whether a JPEG is in colour, upright, and no bomb."""
    with Image.open(BytesIO(content)) as header:
        return header.mode == "RGB" and header.getexif().get(ExifTags.Base.Orientation, 1) == 1
