"""Opening pictures: files, bytes and frames of videos, with errors that name the record and the file."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import groupby
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from vlm.data.sample import BadSample, ImageRef, MediaSize, Sample, VideoRef
from vlm.data.vision.video import DecodedVideo, open_video, read_frames

IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    OverflowError,
    MemoryError,
    RuntimeError,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that are no pictures, or not whole."""

ROTATED = (5, 6, 7, 8)
"""EXIF orientations of pictures that are turned by a quarter."""


def open_media(sample: Sample) -> list[Any]:
    """The pictures and videos of a sample, decoded, in order; frames of a video in one pass over it.

    Returns:
        A Pillow image for each picture, an `DecodedVideo` for each video.

    Raises:
        BadSample: one does not open.
    """
    opened: list[Any] = []
    for video, group in groupby(sample.media, lambda one: one.path if _is_video_frame(one) else None):
        if video is not None:
            frames = [one.frame for one in group if isinstance(one, ImageRef) and one.frame is not None]
            opened += read_frames(video, frames, sample.id)
        else:
            opened += [
                open_video(one, sample.id) if isinstance(one, VideoRef) else open_image(one, sample.id) for one in group
            ]
    return opened


def _is_video_frame(part: ImageRef | VideoRef) -> bool:
    """Whether this is a picture that stands for a part of a video."""
    return isinstance(part, ImageRef) and part.frame is not None


def read_media_sizes(sample: Sample, processor: Any) -> list[MediaSize]:
    """What a processor needs to know of a sample's pictures and videos to count tokens, out of their headers.

    Nothing where it does not need their sizes. Frames are decoded only where theirs matter.

    Raises:
        BadSample: one is no picture.
    """
    media = sample.media
    if not processor.needs_image_sizes:
        return []
    if not processor.pools_video_frames and any(map(_is_video_frame, media)):
        return media_sizes_from_opened(media, open_media(sample), processor)
    found: list[MediaSize] = []
    for one in media:
        if isinstance(one, VideoRef):
            found.append(one.clip)
            continue
        width, height = (0, 0) if one.frame is not None else read_image_size(one, sample.id)
        found.append(None if one.frame is not None else (height, width))
    return found


def media_sizes_from_opened(
    media: Sequence[ImageRef | VideoRef], opened: Sequence[Any], processor: Any
) -> list[MediaSize]:
    """The same of those that are open.

    Height and width of a picture, None of a frame that the processor pools; of a video what is seen of it.
    """
    if not processor.needs_image_sizes:
        return []
    pooled = [processor.pools_video_frames and _is_video_frame(one) for one in media]
    return [
        None if hidden else seen.clip if isinstance(seen, DecodedVideo) else upright_size(seen)
        for hidden, seen in zip(pooled, opened, strict=True)
    ]


def open_image(image_ref: ImageRef, sample_id: str) -> Image.Image:
    """A picture, decoded; of an animated one the first frame.

    Raises:
        BadSample: it does not open, with the record's id and the file.
    """
    if image_ref.frame is not None:
        assert image_ref.path is not None
        return read_frames(image_ref.path, [image_ref.frame], sample_id)[0]
    with wrap_image_errors(image_ref, sample_id), Image.open(_image_source(image_ref)) as image:
        image.load()
        return image


def read_image_size(image_ref: ImageRef, sample_id: str) -> tuple[int, int]:
    """Open a picture's header only: its width and height, as it stands upright.

    Raises:
        BadSample: it is no picture.
    """
    with wrap_image_errors(image_ref, sample_id), Image.open(_image_source(image_ref)) as image:
        height, width = upright_size(image)
        return width, height


def upright_size(image: Image.Image | Tensor) -> tuple[int, int]:
    """Height and width of a picture as it stands upright, of a file that says that it lies too."""
    if isinstance(image, Tensor):
        return image.shape[1], image.shape[2]
    whole = image.format == "PNG" and "exif" not in image.info  # its `getexif` would decode all of it to look further
    lies = not whole and image.getexif().get(ExifTags.Base.Orientation, 1) in ROTATED
    return (image.width, image.height) if lies else (image.height, image.width)


def _image_source(image_ref: ImageRef) -> BytesIO | str:
    return BytesIO(image_ref.content) if image_ref.content is not None else str(image_ref.path)


@contextmanager
def wrap_image_errors(image_ref: ImageRef, sample_id: str) -> Iterator[None]:
    """Pillow's errors as ours; its warning before what it refuses as a bomb is not heard."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except IMAGE_ERRORS as error:
        reason = (
            _describe_non_image(image_ref) or str(error) if isinstance(error, UnidentifiedImageError) else str(error)
        )
        name = None if image_ref.path is None else str(image_ref.path)
        raise BadSample(sample_id, f"image {image_ref} does not open: {reason}", name) from error


def _describe_non_image(image_ref: ImageRef) -> str | None:
    """What a file that is no picture looks like, where that can be said."""
    if image_ref.content is not None:
        head = image_ref.content[:64]
    else:
        with open(str(image_ref.path), "rb") as file:
            head = file.read(64)
    if not head:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return f"it is text that begins with {head.lstrip()[:14].decode(errors='replace')!r}, not a picture"
    return None
