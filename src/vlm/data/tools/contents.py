"""Records and pictures as the bytes that a file of records holds. Imports the standard library, Pillow and siblings."""

import base64
import json
from datetime import date, datetime, time
from io import BytesIO
from typing import Any

from PIL import Image

from vlm.data.records.open import PICTURES
from vlm.data.sample import BadSample, Picture
from vlm.data.vision.images import ERRORS


def as_json(record: dict[str, Any]) -> bytes:
    """A record as one line of JSON, pictures that are held as bytes as `data:` addresses, dates as ISO 8601.

    Raises:
        BadSample: JSON cannot hold it.
    """
    sample_id = str(record.get("id", "?"))
    plain = {
        key: _addresses(value, sample_id) if key in ("image", "images") else value for key, value in record.items()
    }
    try:
        return json.dumps(plain, ensure_ascii=False, allow_nan=False, default=_plain).encode()
    except UnicodeEncodeError:
        raise BadSample(sample_id, "its text is not UTF-8, or has half of a surrogate pair") from None
    except (TypeError, ValueError) as error:
        raise BadSample(sample_id, f"JSON cannot hold it: {error}") from None


def _addresses(value: Any, sample_id: str) -> Any:
    if isinstance(value, list):
        return [_addresses(one, sample_id) for one in value]
    if isinstance(value, dict) and isinstance(content := value.get("bytes"), bytes):
        return f"data:image/{kind_of(content, sample_id)};base64,{base64.b64encode(content).decode()}"
    return value


def _plain(value: object) -> str:
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} {value!r:.40}")


def content_of(picture: Picture, sample_id: str) -> bytes:
    """The bytes of a picture's file.

    Raises:
        BadSample: it cannot be read.
    """
    if picture.content is not None:
        return picture.content
    if picture.path is None or picture.frame is not None:
        raise BadSample(sample_id, f"image {picture} is no file of its own")
    try:
        return picture.path.read_bytes()
    except OSError as error:
        raise BadSample(sample_id, f"image {picture} does not open: {error}", str(picture.path)) from error


def ending_of(picture: Picture, content: bytes, sample_id: str) -> str:
    """What a picture's name ends with in a tar shard: its own ending where readers know it."""
    own = picture.path.suffix.lower().removeprefix(".") if picture.path else ""
    return own if own in PICTURES else kind_of(content, sample_id)


def kind_of(content: bytes, sample_id: str) -> str:
    """The kind of picture that bytes are, as `PICTURES` has it.

    Raises:
        BadSample: none of these.
    """
    try:
        with Image.open(BytesIO(content)) as image:
            kind = str(image.format).lower().replace("mpo", "jpeg")  # cameras' JPEG with a second one behind it
    except ERRORS as error:
        raise BadSample(sample_id, f"one of its pictures does not open: {error}") from error
    if kind not in PICTURES:
        raise BadSample(sample_id, f"one of its pictures is {kind}; allowed are {', '.join(PICTURES)}")
    return kind
