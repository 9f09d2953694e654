"""Decoding of a sample's images: plain JPEGs go from file to tensor in one step, all others through Pillow."""

from collections.abc import Sequence
from io import BytesIO

import simplejpeg
import torch
from PIL import ExifTags, Image
from torch import Tensor

from vlm.data.processor import Processor
from vlm.data.sample import ImageRef, Sample
from vlm.data.vision.images import Medium, open_image, open_media, wrap_image_errors

JPEG = b"\xff\xd8\xff"


def decode_sample_images(sample: Sample, processor: Processor) -> Sequence[Medium]:
    """Decode a sample's images and videos; JPEGs as tensors where the processor accepts them, which is faster."""
    if not processor.accepts_tensors or any(image_ref.frame is not None for image_ref in sample.images):
        return open_media(sample)
    return [read_image_or_tensor(image_ref, sample.id) for image_ref in sample.images]


def read_image_or_tensor(image_ref: ImageRef, sample_id: str) -> Tensor | Image.Image:
    """Decode a plain JPEG as uint8 `(3, height, width)`, with the same values as Pillow; any other file with Pillow."""
    with wrap_image_errors(image_ref, sample_id):
        assert image_ref.path is not None or image_ref.content is not None
        content = image_ref.path.read_bytes() if image_ref.content is None else image_ref.content
        if content.startswith(JPEG) and _is_plain(content):
            try:
                return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
            except ValueError:
                pass  # Pillow tolerates some damage, and explains the rest
    return open_image(ImageRef(image_ref.path, content), sample_id)


def _is_plain(content: bytes) -> bool:
    """Return whether a JPEG is in colour and upright; raise where it is a decompression bomb."""
    with Image.open(BytesIO(content), formats=["JPEG"]) as header:
        return header.mode == "RGB" and header.getexif().get(ExifTags.Base.Orientation, 1) == 1
