"""Records and pictures as the bytes that a file of records holds. Imports the standard library, Pillow and siblings."""

import base64
import json
from datetime import date, datetime, time
from io import BytesIO
from typing import Any

from PIL import Image

from vlm.data.records.open import IMAGE_EXTENSIONS
from vlm.data.sample import BadSample, ImageRef
from vlm.data.vision.images import IMAGE_ERRORS


def as_json(record: dict[str, Any]) -> bytes:
    """A record as one line of JSON, pictures that are held as bytes as `data:` addresses, dates as ISO 8601.

    Raises:
        BadSample: JSON cannot hold it.
    """
    sample_id = str(record.get("id", "?"))
    plain = {
        key: _inline_images(value, sample_id) if key in ("image", "images") else value for key, value in record.items()
    }
    try:
        return json.dumps(plain, ensure_ascii=False, allow_nan=False, default=_json_default).encode()
    except UnicodeEncodeError:
        raise BadSample(sample_id, "its text is not UTF-8, or has half of a surrogate pair") from None
    except (TypeError, ValueError) as error:
        raise BadSample(sample_id, f"JSON cannot hold it: {error}") from None


def _inline_images(value: Any, sample_id: str) -> Any:
    if isinstance(value, list):
        return [_inline_images(one, sample_id) for one in value]
    if isinstance(value, dict) and isinstance(content := value.get("bytes"), bytes):
        return f"data:image/{detect_image_format(content, sample_id)};base64,{base64.b64encode(content).decode()}"
    return value


def _json_default(value: object) -> str:
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} {value!r:.40}")


def read_image_bytes(image_ref: ImageRef, sample_id: str) -> bytes:
    """The bytes of a picture's file.

    Raises:
        BadSample: it cannot be read.
    """
    if image_ref.content is not None:
        return image_ref.content
    if image_ref.path is None or image_ref.frame is not None:
        raise BadSample(sample_id, f"image {image_ref} is no file of its own")
    try:
        return image_ref.path.read_bytes()
    except OSError as error:
        raise BadSample(sample_id, f"image {image_ref} does not open: {error}", str(image_ref.path)) from error


def image_file_extension(image_ref: ImageRef, content: bytes, sample_id: str) -> str:
    """What a picture's name ends with in a tar shard: its own ending where readers know it."""
    own = image_ref.path.suffix.lower().removeprefix(".") if image_ref.path else ""
    return own if own in IMAGE_EXTENSIONS else detect_image_format(content, sample_id)


def detect_image_format(content: bytes, sample_id: str) -> str:
    """The kind of picture that bytes are, as `PICTURES` has it.

    Raises:
        BadSample: none of these.
    """
    try:
        with Image.open(BytesIO(content)) as image:
            kind = str(image.format).lower().replace("mpo", "jpeg")  # cameras' JPEG with a second one behind it
    except IMAGE_ERRORS as error:
        raise BadSample(sample_id, f"one of its pictures does not open: {error}") from error
    if kind not in IMAGE_EXTENSIONS:
        raise BadSample(sample_id, f"one of its pictures is {kind}; allowed are {', '.join(IMAGE_EXTENSIONS)}")
    return kind
