"""Opening images: files, bytes and frames of videos. One that does not open is a `BadSample`, which names the file."""

import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import DecompressionBombError, DecompressionBombWarning

from vlm.data.file_kinds import NUM_HEAD_BYTES, describe_bytes, read_head, show_start
from vlm.data.processor import Processor
from vlm.data.sample import BadSample, ImageRef, MediaSize, Sample, VideoRef
from vlm.data.vision.video import DecodedVideo, open_video, read_frames

if TYPE_CHECKING:
    from torch import Tensor  # slow to import, and none is made here

IMAGE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    DecompressionBombError,
)
"""What Pillow raises for files that are no images, or are truncated, or have broken EXIF data."""

IMAGE_FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "JPEG2000", "TGA", "AVIF", "HEIF",
)  # fmt: skip
"""Formats that are read where Pillow has them, as it calls them: pixels that Pillow decodes itself. Of others, EPS
starts Ghostscript, and so runs a program."""
TIFF_TILE_WIDTH, TIFF_TILE_LENGTH = 322, 323

TRUNCATION = re.compile("truncated|unexpected end|broken data stream|premature end", re.IGNORECASE)
"""What Pillow says of images that end early."""
TRUNCATION_DETAIL = re.compile(r" *\([^)]*\)| when .*")
"""What the message says in addition, which differs from image to image."""

FRAME_BACKGROUND = "white"
"""What shows through a transparent frame of a list: frames of video files have none."""

ROTATED = (5, 6, 7, 8)
"""EXIF orientations that are rotated by 90 degrees."""

Medium: TypeAlias = "Image.Image | Tensor | DecodedVideo"
"""A decoded image or video; tensors are uint8 images `(3, height, width)`."""


def open_media(sample: Sample) -> list[Image.Image | DecodedVideo]:
    """Decode the images and videos of a sample, in order; frames of a video in one pass over it."""
    opened: list[Image.Image | DecodedVideo] = []
    name = sample.id
    for video, refs in groupby(sample.media, lambda ref: ref.path if _is_video_frame(ref) else None):
        if video is None:
            opened += [_open_clip(ref, name) if isinstance(ref, VideoRef) else open_image(ref, name) for ref in refs]
        else:
            frames = [ref.frame for ref in refs if isinstance(ref, ImageRef) and ref.frame is not None]
            opened += read_frames(video, frames, name)
    return opened


def _open_clip(video: VideoRef, sample_id: str) -> DecodedVideo:
    """Decode the frames that are read of a video; those of a list of another size than its first one are resized."""
    if not video.frames:
        return open_video(video, sample_id)
    from vlm.models.pixels import as_rgb  # imports torch

    clip = video.clip
    assert clip is not None
    opened: dict[int, Image.Image] = {}
    for number in dict.fromkeys(clip.frames):
        frame = as_rgb(open_image(video.frames[number], sample_id), FRAME_BACKGROUND)
        opened[number] = frame if frame.size == (clip.width, clip.height) else frame.resize((clip.width, clip.height))
    return DecodedVideo([opened[number] for number in clip.frames], clip)


def _is_pooled_frame(ref: ImageRef | VideoRef) -> bool:
    """Return whether a medium is a frame of a video, extracted before or not."""
    return isinstance(ref, ImageRef) and (ref.frame is not None or ref.is_extracted)


def _is_video_frame(ref: ImageRef | VideoRef) -> bool:
    return isinstance(ref, ImageRef) and ref.frame is not None


def read_media_sizes(sample: Sample, processor: Processor) -> list[MediaSize]:
    """Read the sizes of a sample's images and videos from their headers; empty if the processor needs none.

    Frames of videos are decoded only where the processor needs their sizes.
    """
    media = sample.media
    if not processor.needs_image_sizes:
        return []
    if not processor.pools_video_frames and any(map(_is_video_frame, media)):
        return media_sizes_from_opened(media, open_media(sample), processor)
    sizes: list[MediaSize] = []
    for ref in media:
        if isinstance(ref, VideoRef):
            sizes.append(ref.clip)
        elif processor.pools_video_frames and _is_pooled_frame(ref):
            sizes.append(None)
        else:
            sizes.append(_read_upright_size(ref, sample.id))
    return sizes


def media_sizes_from_opened(
    media: Sequence[ImageRef | VideoRef], opened: Sequence[Medium], processor: Processor
) -> list[MediaSize]:
    """Return the sizes of decoded images and videos; empty if the processor needs none."""
    if not processor.needs_image_sizes:
        return []
    pooled = [processor.pools_video_frames and _is_pooled_frame(ref) for ref in media]
    return [
        None if is_pooled else medium.clip if isinstance(medium, DecodedVideo) else upright_size(medium)
        for is_pooled, medium in zip(pooled, opened, strict=True)
    ]


def open_image(image_ref: ImageRef, sample_id: str) -> Image.Image:
    """Decode an image; the first frame of an animated one."""
    if image_ref.frame is not None:
        assert image_ref.path is not None
        return read_frames(image_ref.path, [image_ref.frame], sample_id)[0]
    with wrap_image_errors(image_ref, sample_id), open_lazily(_image_source(image_ref)) as image:
        image.load()
        image.getexif()  # parsed here, where an error names the image
        return image


def open_lazily(source: BytesIO | str) -> Image.Image:
    """Open an image of `IMAGE_FORMATS`, whose pixels are decoded later.

    Raises:
        UnidentifiedImageError: it is none.
        DecompressionBombError: a tile of a TIFF, which is decoded whole, is larger than Pillow lets an image be.
    """
    Image.init()
    image = Image.open(source, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    if (number := count_tile_pixels(image)) > 2 * (Image.MAX_IMAGE_PIXELS or number):
        image.close()
        raise DecompressionBombError(f"it has tiles of {number:,} pixels")
    return image


def count_tile_pixels(image: Image.Image) -> int:
    """Return the number of pixels of a TIFF's tiles, which are decoded whole, however small the image is."""
    tags = getattr(image, "tag_v2", {})
    width, length = (tags.get(tag) for tag in (TIFF_TILE_WIDTH, TIFF_TILE_LENGTH))
    return width * length if isinstance(width, int) and isinstance(length, int) else 0


def is_uniform(rgb_image: Image.Image) -> bool:
    """Return whether an image in RGB is of one colour throughout, for example because its transparency was lost."""
    return all(low == high for low, high in rgb_image.getextrema())  # pyright: ignore[reportGeneralTypeIssues] - of RGB


def read_image_size(image_ref: ImageRef, sample_id: str) -> tuple[int, int]:
    """Read the upright width and height of an image from its header."""
    height, width = _read_upright_size(image_ref, sample_id)
    return width, height


def _read_upright_size(image_ref: ImageRef, sample_id: str) -> tuple[int, int]:
    with wrap_image_errors(image_ref, sample_id), open_lazily(_image_source(image_ref)) as image:
        return upright_size(image)


@dataclass(frozen=True)
class StoredSize:
    """Width and height of an image as its file stores them, and the EXIF orientation that turns it upright."""

    width: int
    height: int
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """The height and width of the image turned upright."""
        return (self.width, self.height) if self.orientation in ROTATED else (self.height, self.width)


def read_stored_size(image_ref: ImageRef, sample_id: str) -> StoredSize:
    """Read the size and orientation of an image from its header; a frame of a video is decoded.

    Raises:
        BadSample: it does not open.
    """
    if image_ref.frame is not None:
        return stored_size(open_image(image_ref, sample_id))
    with wrap_image_errors(image_ref, sample_id), open_lazily(_image_source(image_ref)) as image:
        return stored_size(image)


def stored_size(image: Image.Image) -> StoredSize:
    """Return the size and orientation of an image that is not turned upright."""
    has_no_exif = image.format == "PNG" and "exif" not in image.info  # `getexif` would decode all of a PNG to be sure
    orientation = 1 if has_no_exif else image.getexif().get(ExifTags.Base.Orientation, 1)
    return StoredSize(image.width, image.height, orientation if orientation in range(1, 9) else 1)


def upright_size(image: "Image.Image | Tensor") -> tuple[int, int]:
    """Return the upright height and width of an image, whatever the orientation of its file."""
    if not isinstance(image, Image.Image):
        return image.shape[1], image.shape[2]
    return stored_size(image).upright


def _image_source(image_ref: ImageRef) -> BytesIO | str:
    return BytesIO(image_ref.content) if image_ref.content is not None else str(image_ref.path)


@contextmanager
def wrap_image_errors(image_ref: ImageRef, sample_id: str) -> Iterator[None]:
    """Turn Pillow's errors into `BadSample`, and silence its warning about decompression bombs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DecompressionBombWarning)
            yield
    except IMAGE_ERRORS as error:
        name = None if image_ref.path is None else str(image_ref.path)
        reason = _describe_error(error, image_ref)
        raise BadSample(sample_id, f"image {image_ref} does not open: {reason}", name) from error


def _describe_error(error: Exception, image_ref: ImageRef) -> str:
    """Describe why an image does not open, in the same words for the same fault."""
    if isinstance(error, UnidentifiedImageError):
        return _describe_non_image(image_ref)
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__  # no `[Errno 2]`
    return TRUNCATION_DETAIL.sub("", text) if TRUNCATION.search(text) else text


def _describe_non_image(image_ref: ImageRef) -> str:
    """Describe a file that Pillow does not read as an image."""
    if image_ref.content is not None:
        head = image_ref.content[:NUM_HEAD_BYTES]
    else:
        assert image_ref.path is not None
        head = read_head(image_ref.path)
    kind = describe_bytes(head)
    if kind is None:
        return f"{show_start(head)}, not an image that is read here; save it as PNG or JPEG"
    if kind.startswith(("a PNG", "a JPEG", "a GIF", "a WebP", "a TIFF")):
        return f"{kind} that is damaged or truncated"
    return f"{kind}, not an image" if kind.startswith("it is text") else kind
