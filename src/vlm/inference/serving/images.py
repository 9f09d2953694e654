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
MAX_HEADER_READS = 5000
"""The most pieces that are read of a file before its pixels: Pillow appends pieces of EXIF and of comments one by one,
which takes quadratic time. Files of cameras and of editors have some hundreds."""
MAX_EXIF_BYTES = 65_536
"""The most bytes of EXIF data, as many as a JPEG's segment holds. Each of its tags may refer to all of them."""
EXIF_MARK = b"Exif\0\0"
START_OF_SCAN = b"\xff\xda"
MAX_SCANS = 100
"""The most scans of a JPEG: each goes over all pixels, in however few bytes. Usual are 1 to 12."""
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
                    check_exif_size(count_exif_bytes(image))
                    image.getexif()  # parsed here, where an error names the image
                    return shrink(image, self.processor)
        except BadSample as error:
            reason = error.reason.replace(f"image {reference}", "the image")
            raise RequestError(f"{param}: {reason}", param=param, code="invalid_image") from None

    def _open(self, content: bytes, param: str) -> Image.Image:
        """Return an image that is not decoded yet, once its size is known to be allowed."""
        file = MeteredFile(content)
        image = Image.open(file, formats=FORMATS)
        file.max_reads = None
        if image.format in ("JPEG", "MPO") and content.count(START_OF_SCAN) > MAX_SCANS:
            raise ValueError(f"it has more than {MAX_SCANS} scans")
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
                    param=param,
                    code="limit_exceeded",
                )
        self._num_pixels += number
        return image


class MeteredFile(BytesIO):
    """A file of which headers read so much and no more: tags that all refer to the same bytes would fill the memory.

    Attributes:
        max_reads: how often it may be read; None: any number of times.
    """

    def __init__(self, content: bytes):
        super().__init__(content)
        self.max_reads: int | None = MAX_HEADER_READS
        self._max_bytes = 2 * len(content) + 2**20
        self._num_reads = self._num_bytes = self._num_exif_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes.

        Raises:
            ValueError: too many bytes were read, or in too many pieces.
        """
        content = super().read(size)
        if self.max_reads is not None:
            self._num_reads += 1
            self._num_bytes += len(content)
            if content.startswith(EXIF_MARK):  # a JPEG's segment; Pillow parses all of them while it opens the file
                self._num_exif_bytes += len(content)
                check_exif_size(self._num_exif_bytes)
            if self._num_reads > self.max_reads or self._num_bytes > self._max_bytes:
                raise ValueError("its metadata is in too many pieces, or overlaps")
        return content


def count_exif_bytes(image: Image.Image) -> int:
    """Return the number of bytes of an image's EXIF data, in whichever form a PNG has it."""
    return max(len(image.info.get("exif", b"")), len(image.info.get("Raw profile type exif", "")) // 2)


def check_exif_size(size: int) -> None:
    """Refuse EXIF data of more bytes than allowed, before it is parsed."""
    if size > MAX_EXIF_BYTES:
        raise ValueError(f"it has {size:,} bytes of EXIF data, at most {MAX_EXIF_BYTES:,} are read")


def decode_data_url(url: str, param: str) -> bytes:
    """Return the bytes of a `data:` address in base64.

    Raises:
        RequestError: it is another address, which is never fetched, or no base64.
    """
    match = DATA_URL.match(url[:80].lower())
    if match is None:
        hint = "send the image itself as data:image/png;base64,…; addresses are not fetched"
        raise RequestError(f"{param}: {hint}, got {show(url)}", param=param, code="invalid_image_url")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:  # letters beyond ASCII raise a plain one
        message = f"{param}: its base64 cannot be decoded: {error}"
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
