"""Where a record's pictures and videos are: paths that stay within the image folder, or bytes in the record itself.

Imports the in-memory form and the standard library only, since configurations are checked with it.
"""

import base64
import binascii
import os
from pathlib import Path
from typing import Any

from vlm.data.sample import BadSample, ImageRef, VideoRef

FILE_KEYS = ("path", "url", "image", "video", "file")
"""Keys under which an item of a message names its file, besides its own type."""


def image_refs_from_value(value: Any, folder: Path, sample_id: str, key: str = "image") -> list[ImageRef]:
    """The pictures that a record names: none, one or a list.

    Each is a path within `folder`, a `data:` address, or a mapping with `bytes` or `path`, as Hugging Face data sets
    hold pictures.

    Raises:
        BadSample: one is neither, does not exist, or leaves the folder.
    """
    return [image_ref_from_value(one, folder, sample_id, key) for one in _as_list(value, sample_id, key)]


def video_refs_from_value(value: Any, folder: Path, sample_id: str, key: str = "video") -> list[VideoRef]:
    """The videos that a record names, as paths within `folder`: none, one or a list.

    Raises:
        BadSample: one is no path, does not exist, or leaves the folder.
    """
    return [video_ref_from_value(one, folder, sample_id, key) for one in _as_list(value, sample_id, key)]


def image_ref_from_value(value: Any, folder: Path, sample_id: str, key: str = "image") -> ImageRef:
    """One picture, as `image_refs_from_value` takes it."""
    if isinstance(value, dict):
        content, name = value.get("bytes"), value.get("path")
        if isinstance(content, bytes):
            return ImageRef(Path(name) if isinstance(name, str) else None, content)
        value = name
    if not isinstance(value, str):
        raise BadSample(
            sample_id, f"`{key}` must be a path, a list of paths, or hold the bytes of a picture, got {value!r:.60}"
        )
    if value.startswith("data:image/"):
        return ImageRef(None, _decode_data_url(value, sample_id))
    return ImageRef(resolve_media_file(value, folder, sample_id))


def video_ref_from_value(value: Any, folder: Path, sample_id: str, key: str = "video") -> VideoRef:
    """One video, as `video_refs_from_value` takes it."""
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str):
        raise BadSample(sample_id, f"`{key}` must be a path or a list of paths, got {value!r:.60}")
    return VideoRef(resolve_media_file(value, folder, sample_id))


def resolve_media_file(name: str, folder: Path, sample_id: str) -> Path:
    """A file within a folder.

    Raises:
        BadSample: it is an address, does not exist, or leaves the folder.
    """
    if "://" in name:
        raise BadSample(sample_id, f"{name}: addresses are not fetched in training; download the picture first", name)
    path = folder / name
    if not os.path.isfile(path):  # unlike pathlib's, false for names that no file can have, such as base64
        raise BadSample(sample_id, f"image file {path} does not exist", name)
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):  # links are the user's own
        raise BadSample(sample_id, f"{name} leaves the image folder {folder}", name)
    return path


def _as_list(value: Any, sample_id: str, key: str) -> list[Any]:
    """A record's value as a list; what is neither nothing, one thing nor a list is refused."""
    if value is None or isinstance(value, list):
        return value or []
    if isinstance(value, (str, dict)):
        return [value]
    raise BadSample(sample_id, f"`{key}` must be a path or a list of paths, got {value!r:.60}")


def _decode_data_url(address: str, sample_id: str) -> bytes:
    """The bytes of a `data:image/…;base64,…` address."""
    head, _, body = address.partition(",")
    try:
        if not head.endswith(";base64"):
            raise binascii.Error("only base64 is read")
        return base64.b64decode(body, validate=True)
    except ValueError as error:  # binascii.Error is one; letters beyond ASCII raise a plain one
        raise BadSample(sample_id, f"a picture in a data: address does not decode: {error}") from None
