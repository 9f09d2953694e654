"""Objects of a record: boxes, points and time spans, as a `Sample` holds them. Imports the standard library only."""

from dataclasses import dataclass

BOX, POINT, SPAN, NAME = "box", "point", "span", "name"
"""Kinds of objects; one of the last kind has a label and no place."""
NUM_VALUES = {BOX: 4, POINT: 2, SPAN: 2, NAME: 0}
PIXELS, SHARE, THOUSANDTHS = "pixels", "share", "thousandths"
"""Units of boxes and points: pixels of the stored image, shares of its sides, or thousandths of them."""
UNIT_SIZES = {SHARE: 1.0, THOUSANDTHS: 1000.0}
"""Units that do not depend on the size of the image -> the length of a side in them."""


@dataclass(frozen=True)
class MarkedObject:
    """An object of a record.

    Attributes:
        kind: `box`, `point`, `span` or `name`.
        values: `(x1, y1, x2, y2)`, `(x, y)`, `(start, end)` in seconds, or nothing.
        label: what it is; None if the record does not say.
        medium: the number of its image, of a span of its video, from 0 in the order of the text.
        units: of a box or point: `pixels`, `share` or `thousandths`.
        upright: whether its coordinates are those of the image as it is shown; else of the file as it is stored, before
            its EXIF orientation is applied.
        is_answer: whether the last reply tells where it is.
    """

    kind: str
    values: tuple[float, ...] = ()
    label: str | None = None
    medium: int = 0
    units: str = PIXELS
    upright: bool = True
    is_answer: bool = False

    def as_record(self) -> dict[str, object]:
        """Return the object as a record's `objects` lists it, without keys that have their default."""
        values = [round(value, 4) for value in self.values]
        place = {} if self.kind == NAME else {self.kind: values}
        medium = {} if not self.medium else {"video" if self.kind == SPAN else "image": self.medium}
        units = {} if self.units == PIXELS else {"units": self.units}
        upright = {} if self.upright else {"upright": False}
        return {**({} if self.label is None else {"label": self.label}), **place, **medium, **units, **upright}


def turn_upright(values: tuple[float, ...], orientation: int, stored_size: tuple[float, float]) -> tuple[float, ...]:
    """Return coordinates of a stored image as those of the image turned upright.

    Args:
        values: `x, y, x, y …`; of two points, the result begins with the smaller coordinates.
        orientation: the EXIF orientation, 1 to 8 (CIPA DC-008, tag 274).
        stored_size: width and height as the file stores them.
    """
    width, height = stored_size
    turn = {
        1: lambda x, y: (x, y),
        2: lambda x, y: (width - x, y),
        3: lambda x, y: (width - x, height - y),
        4: lambda x, y: (x, height - y),
        5: lambda x, y: (y, x),
        6: lambda x, y: (height - y, x),
        7: lambda x, y: (height - y, width - x),
        8: lambda x, y: (y, width - x),
    }[orientation]
    points = [turn(x, y) for x, y in zip(values[::2], values[1::2], strict=True)]
    if len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = [(min(x1, x2), min(y1, y2)), (max(x1, x2), max(y1, y2))]
    return tuple(value for point in points for value in point)
