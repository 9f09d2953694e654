"""Images within text, as tables hold them: base64 without a `data:` address around it. Standard library only."""

import base64

MIN_CHARACTERS = 64
"""A shorter text is taken for the name of a file, because no image is that small."""
IMAGE_SIGNATURES = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF8",
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\1\0",
    b"\0\0\0\x0cjP  ",
)
"""What image files begin with."""


def is_base64_image(text: str) -> bool:
    """Return whether a text begins as an image in base64 does (of either alphabet, in lines or not)."""
    head = "".join(text[: 2 * MIN_CHARACTERS].split())[:MIN_CHARACTERS]
    if len(head) < MIN_CHARACTERS or "." in head:
        return False
    try:
        start = decode_base64(head)
    except ValueError:
        return False
    return start.startswith(IMAGE_SIGNATURES) or start[4:8] == b"ftyp"


def decode_base64(text: str) -> bytes:
    """Decode base64, whose padding may be left out.

    Raises:
        ValueError: the text is not base64.
    """
    plain = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
