"""Records and images as the bytes of a file of records; what cannot be one is a `BadSample`.

Imports the standard library, Pillow and siblings.
"""

import base64
import json
from datetime import date, datetime, time
from io import BytesIO

from PIL import Image

from vlm.data.records.open import IMAGE_EXTENSIONS
from vlm.data.sample import BadSample, ImageRef, Record
from vlm.data.vision.images import IMAGE_ERRORS


def as_json(record: Record) -> bytes:
    """Format a record as one line of JSON, with the bytes of images as `data:` URLs and dates as ISO 8601."""
    sample_id = str(record.get("id", "?"))
    inlined = {key: _inline_images(record[key], sample_id) for key in ("image", "images") if key in record}
    try:
        return json.dumps({**record, **inlined}, ensure_ascii=False, allow_nan=False, default=_json_default).encode()
    except UnicodeEncodeError:
        raise BadSample(sample_id, "its text is not UTF-8, or has half of a surrogate pair") from None
    except (TypeError, ValueError) as error:
        raise BadSample(sample_id, f"JSON cannot hold it: {error}") from None


def _inline_images(value: object, sample_id: str) -> object:
    if isinstance(value, list):
        return [_inline_images(item, sample_id) for item in value]
    if isinstance(value, dict) and isinstance(content := value.get("bytes"), bytes):
        return f"data:image/{detect_image_format(content, sample_id)};base64,{base64.b64encode(content).decode()}"
    return value


def _json_default(value: object) -> str:
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} {value!r:.40}")


def read_image_bytes(image_ref: ImageRef, sample_id: str) -> bytes:
    """Read the bytes of an image's file."""
    if image_ref.content is not None:
        return image_ref.content
    if image_ref.path is None or image_ref.frame is not None:
        raise BadSample(sample_id, f"image {image_ref} is no file of its own")
    try:
        return image_ref.path.read_bytes()
    except OSError as error:
        raise BadSample(sample_id, f"image {image_ref} does not open: {error}", str(image_ref.path)) from error


def image_file_extension(image_ref: ImageRef, content: bytes, sample_id: str) -> str:
    """Return the extension of an image in a tar shard: that of its file where readers know it, else its format."""
    extension = image_ref.path.suffix.lower().removeprefix(".") if image_ref.path else ""
    return extension if extension in IMAGE_EXTENSIONS else detect_image_format(content, sample_id)


def detect_image_format(content: bytes, sample_id: str) -> str:
    """Return the format of an image, one of `IMAGE_EXTENSIONS`."""
    try:
        with Image.open(BytesIO(content)) as image:
            kind = str(image.format).lower().replace("mpo", "jpeg")  # an MPO is a JPEG followed by another
    except IMAGE_ERRORS as error:
        raise BadSample(sample_id, f"one of its images does not open: {error}") from error
    if kind not in IMAGE_EXTENSIONS:
        raise BadSample(sample_id, f"one of its images is {kind}; allowed are {', '.join(IMAGE_EXTENSIONS)}")
    return kind
