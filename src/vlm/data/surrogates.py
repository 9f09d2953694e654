"""Halves of surrogate pairs in texts, which no encoding writes. Imports the standard library only."""

import re
from collections.abc import Mapping

SURROGATE = re.compile("[\ud800-\udfff]")
HALF_PAIR = "has half of a surrogate pair, as of an emoji cut in two or of bytes that are not UTF-8; fix that text"
"""What is wrong with a text that no encoding can write."""


def has_surrogate(text: str) -> bool:
    """Return whether a text has half of a surrogate pair, such as of an emoji cut in two: no encoding writes it."""
    return not text.isascii() and SURROGATE.search(text) is not None


def escape_surrogates(text: str) -> str:
    r"""Return a text with each half of a surrogate pair written as its escape, such as `\ud83d`."""
    return text.encode("utf-8", "backslashreplace").decode() if has_surrogate(text) else text


def find_surrogate(value: object, place: str = "") -> str | None:
    """Return the place of a text, or of a key, with half of a surrogate pair within nested values; None: there is none.

    Args:
        value: a value of JSON.
        place: what is before the place, such as the name of the value.
    """
    if isinstance(value, str):
        return place if has_surrogate(value) else None
    if isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{place}.{key}" if place else str(key)
            if has_surrogate(str(key)):
                return escape_surrogates(inner)
            if (found := find_surrogate(item, inner)) is not None:
                return found
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            if (found := find_surrogate(item, f"{place}[{number}]")) is not None:
                return found
    return None
