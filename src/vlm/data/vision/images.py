"""Opening pictures: files, bytes and frames of videos, with errors that name the record and the file."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import groupby
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from vlm.data.sample import BadSample, Picture, Sample, Size, Video
from vlm.data.vision.video import OpenVideo, open_video, read_frames

ERRORS = (OSError, SyntaxError, ValueError, OverflowError, MemoryError, RuntimeError, Image.DecompressionBombError)
"""What Pillow raises for files that are no pictures, or not whole."""

LYING = (5, 6, 7, 8)
"""EXIF orientations of pictures that are turned by a quarter."""


def open_pictures(sample: Sample) -> list[Any]:
    """The pictures and videos of a sample, decoded, in order; frames of a video in one pass over it.

    Returns:
        A Pillow image for each picture, an `OpenVideo` for each video.

    Raises:
        BadSample: one does not open.
    """
    opened: list[Any] = []
    for video, group in groupby(sample.media, lambda one: one.path if _is_frame(one) else None):
        if video is not None:
            frames = [one.frame for one in group if isinstance(one, Picture) and one.frame is not None]
            opened += read_frames(video, frames, sample.id)
        else:
            opened += [
                open_video(one, sample.id) if isinstance(one, Video) else open_picture(one, sample.id) for one in group
            ]
    return opened


def _is_frame(part: Picture | Video) -> bool:
    """Whether this is a picture that stands for a part of a video."""
    return isinstance(part, Picture) and part.frame is not None


def picture_sizes(sample: Sample, processor: Any) -> list[Size]:
    """What a processor needs to know of a sample's pictures and videos to count tokens, out of their headers.

    Nothing where it does not need their sizes. Frames are decoded only where theirs matter.

    Raises:
        BadSample: one is no picture.
    """
    media = sample.media
    if not processor.needs_sizes:
        return []
    if not processor.pools_frames and any(map(_is_frame, media)):
        return seen_sizes(media, open_pictures(sample), processor)
    found: list[Size] = []
    for one in media:
        if isinstance(one, Video):
            found.append(one.clip)
            continue
        width, height = (0, 0) if one.frame is not None else check_picture(one, sample.id)
        found.append(None if one.frame is not None else (height, width))
    return found


def seen_sizes(media: Sequence[Picture | Video], opened: Sequence[Any], processor: Any) -> list[Size]:
    """The same of those that are open.

    Height and width of a picture, None of a frame that the processor pools; of a video what is seen of it.
    """
    if not processor.needs_sizes:
        return []
    pooled = [processor.pools_frames and _is_frame(one) for one in media]
    return [
        None if hidden else seen.clip if isinstance(seen, OpenVideo) else size_of(seen)
        for hidden, seen in zip(pooled, opened, strict=True)
    ]


def open_picture(picture: Picture, sample_id: str) -> Image.Image:
    """A picture, decoded; of an animated one the first frame.

    Raises:
        BadSample: it does not open, with the record's id and the file.
    """
    if picture.frame is not None:
        assert picture.path is not None
        return read_frames(picture.path, [picture.frame], sample_id)[0]
    with errors_named(picture, sample_id), Image.open(_source(picture)) as image:
        image.load()
        return image


def check_picture(picture: Picture, sample_id: str) -> tuple[int, int]:
    """Open a picture's header only: its width and height, as it stands upright.

    Raises:
        BadSample: it is no picture.
    """
    with errors_named(picture, sample_id), Image.open(_source(picture)) as image:
        height, width = size_of(image)
        return width, height


def size_of(image: Image.Image | Tensor) -> tuple[int, int]:
    """Height and width of a picture as it stands upright, of a file that says that it lies too."""
    if isinstance(image, Tensor):
        return image.shape[1], image.shape[2]
    whole = image.format == "PNG" and "exif" not in image.info  # its `getexif` would decode all of it to look further
    lies = not whole and image.getexif().get(ExifTags.Base.Orientation, 1) in LYING
    return (image.width, image.height) if lies else (image.height, image.width)


def _source(picture: Picture) -> BytesIO | str:
    return BytesIO(picture.content) if picture.content is not None else str(picture.path)


@contextmanager
def errors_named(picture: Picture, sample_id: str) -> Iterator[None]:
    """Pillow's errors as ours; its warning before what it refuses as a bomb is not heard."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except ERRORS as error:
        reason = _kind(picture) or str(error) if isinstance(error, UnidentifiedImageError) else str(error)
        name = None if picture.path is None else str(picture.path)
        raise BadSample(sample_id, f"image {picture} does not open: {reason}", name) from error


def _kind(picture: Picture) -> str | None:
    """What a file that is no picture looks like, where that can be said."""
    if picture.content is not None:
        head = picture.content[:64]
    else:
        with open(str(picture.path), "rb") as file:
            head = file.read(64)
    if not head:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return f"it is text that begins with {head.lstrip()[:14].decode(errors='replace')!r}, not a picture"
    return None
