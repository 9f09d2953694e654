"""Values of records as text: what a record gives where a string is needed. Imports the standard library only."""

import math
import struct
from decimal import Decimal


class WrittenFloat(float):
    """A number with a fraction or an exponent, out of a JSON file; `text` is how the file writes it."""

    text: str

    def __new__(cls, text: str) -> "WrittenFloat":
        """Return the number that a text is."""
        number = super().__new__(cls, text)
        number.text = text
        return number


def text_from_value(value: object) -> str | None:
    """Return a string, or a number in its exact text form (3, 2.5, 1e-07); None for any other value.

    A number of a JSON file is returned as the file writes it: 2.50 is not 2.5.
    A float of 32 bits with a fraction is written with the fewest digits that tell it from others of 32 bits, since
    columns of such numbers hold 0.1 as 0.10000000149011612. Truth values have no text: they could read yes, true or
    True.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, WrittenFloat):
        return value.text if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return None
    if value.is_integer() and abs(value) < MAX_EXACT_INTEGER:
        return repr(value)
    if abs(value) < MAX_FLOAT32 and len(repr(value)) > MIN_DIGITS and _as_float32(value) == value:
        return next(
            text for digits in range(1, 18) if _as_float32(float(text := repr(float(f"{value:.{digits}g}")))) == value
        )
    return repr(value)


MAX_FLOAT32 = 3.4028234663852886e38
MAX_EXACT_INTEGER = 2**53
"""Up to this number, floats hold every integer exactly."""
MIN_DIGITS = 11
"""Numbers written in fewer characters are exact as they stand."""


def _as_float32(value: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
