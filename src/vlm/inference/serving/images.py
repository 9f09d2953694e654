"""Images of requests: out of `data:` addresses, looked at before they are decoded, decoded one by one, and shrunk."""

import base64
import binascii
import re
from io import BytesIO

from PIL import Image

from vlm.config.serving_schema import ServingConfig
from vlm.data.processor import Processor
from vlm.data.sample import BadSample, ImageRef
from vlm.data.vision.images import Medium, count_tile_pixels, wrap_image_errors
from vlm.inference.serving.errors import RequestError, show

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are opened, as Pillow calls them; none of them runs another program."""
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,")


class ImageReader:
    """Decodes the images of one request.

    Args:
        processor: the model's; decides what is kept of an image.
        config: the limits.
    """

    def __init__(self, processor: Processor, config: ServingConfig):
        self.processor, self.config = processor, config
        self._num_pixels = 0

    def read(self, url: str, param: str) -> Medium:
        """Return the image of a `data:` address, the first one of several, as small as the model takes it.

        Args:
            url: the address.
            param: its place in the request.

        Raises:
            RequestError: it is no `data:` address of an image, does not open, or has too many pixels.
        """
        reference = ImageRef(content=decode_data_url(url, param))
        try:
            with wrap_image_errors(reference, param):
                image = self._open(reference.content or b"", param)
                with image:
                    image.load()
                    image.getexif()  # parsed here, where an error names the image
                    return shrink(image, self.processor)
        except BadSample as error:
            reason = error.reason.replace(f"image {reference}", "the image")
            raise RequestError(f"{param}: {reason}", param=param, code="invalid_image") from None

    def _open(self, content: bytes, param: str) -> Image.Image:
        """Return an image that is not decoded yet, once its size is known to be allowed."""
        image = Image.open(BytesIO(content), formats=FORMATS)
        number, longest = max(image.width * image.height, count_tile_pixels(image)), max(image.size)
        for given, key, limit in (
            (number, "max_image_pixels", self.config.max_image_pixels),
            (longest, "max_image_side", self.config.max_image_side),
            (longest / max(1, min(image.size)), "max_aspect_ratio", self.config.max_aspect_ratio),
            (self._num_pixels + number, "max_request_pixels", self.config.max_request_pixels),
        ):
            if given > limit:
                size = f"{image.width} × {image.height} pixels"
                image.close()
                raise RequestError(
                    f"{param}: {size}, beyond serving.{key}={limit:,}; send a smaller image",
                    param=param, code="limit_exceeded",
                )  # fmt: skip
        self._num_pixels += number
        return image


def decode_data_url(url: str, param: str) -> bytes:
    """Return the bytes of a `data:` address in base64.

    Raises:
        RequestError: it is another address, which is never fetched, or no base64.
    """
    match = DATA_URL.match(url[:80].lower())
    if match is None:
        hint = "the image itself is needed, as data:image/png;base64,…; addresses are not fetched"
        raise RequestError(f"{param}: {hint}, got {show(url)}", param=param, code="invalid_image_url")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:  # letters beyond ASCII raise a plain one
        message = f"{param}: its base64 does not decode: {error}"
        raise RequestError(message, param=param, code="invalid_image_url") from None


def shrink(image: Image.Image, processor: Processor) -> Medium:
    """Return a decoded image as the model takes it: its final pixels where that is a size of its own, else in RGB.

    The final pixels `(3, height, width)` pass through the processor unchanged: its image processor leaves an image of
    that size as it is. Where the number of views or tokens depends on the image's size, all of its pixels are kept.
    """
    rgb_image = processor.as_rgb(image)
    if processor.needs_image_sizes or not processor.accepts_tensors:
        return rgb_image
    pixels = processor.image_inputs([rgb_image])["pixel_values"][0]
    channels = pixels[:3]
    again = processor.image_inputs([channels])["pixel_values"][0]
    return channels if again.equal(pixels) else rgb_image
