"""Where a record's images and videos are: paths that stay within the image folder, or bytes in the record itself.

Imports the in-memory form, its siblings and the standard library only, since configurations are checked with it.
"""

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Any

from vlm.data.records.embedded import decode_base64, is_base64_image
from vlm.data.sample import PLACEHOLDER, VIDEO_PLACEHOLDER, BadSample, ContentPart, ImageRef, Record, VideoRef

PLACEHOLDER_PATTERN = re.compile(f"({PLACEHOLDER}|{VIDEO_PLACEHOLDER})")
FILE_KEYS = ("path", "url", "image", "video", "file")
"""Keys under which an item of a message names its file, besides its own type."""


def image_refs_from_value(value: object, folder: Path, sample_id: str, key: str = "image") -> list[ImageRef]:
    """Read the images that a record names: none, one or a list.

    Each is a path within `folder`, a `data:` URL, the bytes of an image or their base64, or a mapping with `bytes` or
    `path`, as in Hugging Face data sets.

    Raises:
        BadSample: a value is none of these, or its file does not exist or is outside the folder.
    """
    return [image_ref_from_value(item, folder, sample_id, key) for item in _as_list(value, sample_id, key)]


def image_ref_from_value(value: object, folder: Path, sample_id: str, key: str = "image") -> ImageRef:
    """Read one image, see `image_refs_from_value`."""
    if isinstance(value, dict):
        content, value = value.get("bytes"), value.get("path")
        if isinstance(content, str):
            content = _decode_image_text(content, sample_id)
        if isinstance(content, bytes):
            return ImageRef(Path(value) if isinstance(value, str) else None, content)
    if isinstance(value, bytes):
        return ImageRef(None, value)
    if not isinstance(value, str):
        needed = f"`{key}` must be a path, a list of paths, or hold the bytes of an image"
        raise BadSample(sample_id, f"{needed}, got {value!r:.60}")
    if value.startswith("data:"):
        return ImageRef(None, _decode_data_url(value, sample_id))
    if is_base64_image(value) and not os.path.isfile(folder / value):
        return ImageRef(None, _decode_image_text(value, sample_id))
    return ImageRef(resolve_media_file(value, folder, sample_id))


def video_ref_from_value(value: object, folder: Path, sample_id: str, key: str = "video") -> VideoRef:
    """Read one video, a path within `folder`.

    Raises:
        BadSample: the value is no path, or its file does not exist or is outside the folder.
    """
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str):
        raise BadSample(sample_id, f"`{key}` must be a path or a list of paths, got {value!r:.60}")
    return VideoRef(resolve_media_file(value, folder, sample_id))


def resolve_media_file(name: str, folder: Path, sample_id: str) -> Path:
    """Return the path of a file within a folder.

    Raises:
        BadSample: the name is a URL, or the file does not exist or is outside the folder.
    """
    if "://" in name:
        raise BadSample(sample_id, f"{name}: addresses are not fetched in training; download the image first", name)
    path = folder / name
    if not os.path.isfile(path):  # unlike pathlib's, false for names that no file can have, such as base64
        raise BadSample(sample_id, f"image file {path} does not exist", name)
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):  # links are the user's own
        raise BadSample(sample_id, f"{name} leaves the image folder {folder}", name)
    return path


def _as_list(value: object, sample_id: str, key: str) -> list[object]:
    """Return a record's value as a list: a list itself, a string or mapping as its only item, None as empty."""
    if value is None or isinstance(value, list):
        return value or []
    if isinstance(value, (str, dict, bytes)):
        return [value]
    raise BadSample(sample_id, f"`{key}` must be a path or a list of paths, got {value!r:.60}")


def _decode_image_text(text: str, sample_id: str) -> bytes:
    """Decode an image that a text holds in base64."""
    try:
        return decode_base64(text)
    except ValueError as error:
        raise BadSample(sample_id, f"an image in base64 does not decode: {error}") from None


def _decode_data_url(address: str, sample_id: str) -> bytes:
    """Decode a `data:…;base64,…` URL, whatever kind of file it says it holds."""
    head, _, body = address.partition(",")
    try:
        if not head.endswith(";base64"):
            raise binascii.Error("only base64 is read")
        return base64.b64decode(body, validate=True)
    except ValueError as error:  # binascii.Error is one; letters beyond ASCII raise a plain one
        raise BadSample(sample_id, f"an image in a data: address does not decode: {error}") from None


class MediaPlacer:
    """Puts a record's images and videos in the places of the placeholders in its text, in order.

    They are listed as `image` or `images`, `video` or `videos`.
    """

    def __init__(self, record: Record, folder: Path, sample_id: str):
        self.folder, self.sample_id = folder, sample_id
        images = image_refs_from_value(first_present(record, "image", "images"), folder, sample_id)
        listed = _as_list(first_present(record, "video", "videos"), sample_id, "video")
        videos = [video_ref_from_value(item, folder, sample_id) for item in listed]
        self.has_media = bool(images or videos)
        self.unplaced = {PLACEHOLDER: iter(images), VIDEO_PLACEHOLDER: iter(videos)}

    def next(self, placeholder: str) -> ImageRef | VideoRef:
        """Return the next image or video.

        Raises:
            BadSample: none is left.
        """
        ref = next(self.unplaced[placeholder], None)
        if ref is None:
            kind = "images" if placeholder == PLACEHOLDER else "videos"
            raise BadSample(self.sample_id, f"more {placeholder} in its text than {kind}")
        return ref

    def read_item(self, item: Record) -> ImageRef | VideoRef | None:
        """Return the image or video that an item of a message names, else the next one; None for items of other types.

        A value of None means absent, since rows of a table hold None for missing keys.
        """
        kind = item.get("type")
        if kind == "image_url":
            file = item.get(kind)
            file = file.get("url") if isinstance(file, dict) else file
        elif kind in ("image", "video"):
            file = first_present(item, *FILE_KEYS)
            if file is None:
                return self.next(PLACEHOLDER if kind == "image" else VIDEO_PLACEHOLDER)
        else:
            return None
        read = video_ref_from_value if kind == "video" else image_ref_from_value
        return read(file, self.folder, self.sample_id, kind)

    def rest(self) -> tuple[ImageRef | VideoRef, ...]:
        """Return all that are not placed yet: videos first, as they are longer."""
        return (*self.unplaced[VIDEO_PLACEHOLDER], *self.unplaced[PLACEHOLDER])

    def within(self, text: str) -> tuple[ContentPart, ...]:
        """Return a text with its placeholders replaced by images and videos."""
        pieces = filter(None, PLACEHOLDER_PATTERN.split(text))
        return tuple(self.next(piece) if piece in self.unplaced else piece for piece in pieces)

    def place_or_prepend(self, text: str) -> tuple[ContentPart, ...]:
        """Return a question with its placeholders replaced; without any, all images and videos come first."""
        if PLACEHOLDER_PATTERN.search(text):
            return self.within(move_image_first(text))
        return (*self.rest(), f"\n{text}" if self.has_media else text)

    def check_all_placed(self) -> None:
        """Raise BadSample where an image or video has no place in the text."""
        if number := len(self.rest()):
            raise BadSample(self.sample_id, f"{number} more image(s) than {PLACEHOLDER} in its text")


def move_image_first(text: str) -> str:
    """Move the only image placeholder of a turn to its start, as LLaVA does."""
    if text.count(PLACEHOLDER) != 1:
        return text
    question = text.replace(PLACEHOLDER, "").strip()
    return f"{PLACEHOLDER}\n{question}" if question else PLACEHOLDER


def first_present(record: Record, *keys: str) -> Any:
    """Return the first value of a record's keys that is not None; None where there is none."""
    return next((record[key] for key in keys if record.get(key) is not None), None)
