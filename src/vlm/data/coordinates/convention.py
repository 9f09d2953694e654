"""The interface of a convention: how a family of models writes boxes, points and time spans, and how to parse them.

To add one, write a subclass of `Convention` and add it to `table.CONVENTIONS`; users name their own as
`package.module:Class`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from vlm.data.objects import BOX, NUM_VALUES, POINT, SPAN

Number = TypeVar("Number")
NUMBER = r"-?\d+(?:\.\d+)?"
SPAN_TEXT = re.compile(rf"({NUMBER})\s*(?:-|–|to)\s*({NUMBER})\s*s(?:ec(?:ond)?s?)?\b")
LABEL_BEFORE = re.compile(r"(?:^|\n)\s*([^\n:\[\]<>{}]+):\s*$")
"""The label of a line `label: …`, before its place."""


@dataclass(frozen=True)
class Place:
    """Where an object is in what the model sees.

    Attributes:
        kind: `box`, `point` or `span`.
        values: shares of the sides of what the model sees, `x1, y1, x2, y2` or `x, y`; of a span, seconds.
        label: what the object is; None if nothing says so.
        seen_size: width and height of what the model sees, in pixels.
        medium: the number of its image, from 0; None if an answer does not say.
    """

    kind: str
    values: tuple[float, ...]
    label: str | None = None
    seen_size: tuple[float, float] = (1.0, 1.0)
    medium: int | None = None


class Convention(ABC):
    """A way to write places.

    Attributes:
        name: its name in `dataset.coordinates`.
        source: where it is documented.
        steps: the number of steps of a side of the image; None: the pixels that the model sees.
        highest: the largest number; None: that of `steps`, or of pixels.
        decimals: the decimals of a number.
        is_y_first: whether `y` is before `x`.
        sees_stored_image: whether pixels are those of the stored image, whatever the model sees of it.
        token_pattern: matches the special tokens that it writes; None: it writes plain text.
        required_tokens: tokens without which a tokenizer cannot write it.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    steps: ClassVar[float | None] = 1000
    highest: ClassVar[float | None] = None
    decimals: ClassVar[int] = 0
    is_y_first: ClassVar[bool] = False
    sees_stored_image: ClassVar[bool] = False
    token_pattern: ClassVar[re.Pattern[str] | None] = None
    required_tokens: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def write_place(self, place: Place) -> str:
        """Return the text of one box or point, without its label; ValueError if there is none for its kind."""

    @abstractmethod
    def write_list(self, places: Sequence[Place]) -> str:
        """Return the text of several boxes and points with their labels."""

    @abstractmethod
    def read_places(self, text: str, seen_size: tuple[float, float]) -> Iterator[Place]:
        """Yield the boxes and points of an answer, in order; incomplete or invalid ones are skipped."""

    def write_label(self, label: str) -> str:
        """Return the text of a label within a sentence."""
        return label

    def write(self, place: Place) -> str:
        """Return the text of one place, without its label; all conventions write time spans in the same way."""
        if place.kind != SPAN:
            return self.write_place(place)
        start, end = place.values
        return f"{start:.1f} - {end:.1f} seconds"

    def write_all(self, places: Sequence[Place]) -> str:
        """Return the text of several places with their labels; time spans are on lines of their own."""
        shown, spans = ([place for place in places if (place.kind == SPAN) == is_span] for is_span in (False, True))
        lines = [*([self.write_list(shown)] if shown else []), *map(self._labelled_line, spans)]
        return "\n".join(lines)

    def _labelled_line(self, place: Place) -> str:
        return self.write(place) if place.label is None else f"{place.label}: {self.write(place)}"

    def read(self, text: str, seen_size: tuple[float, float]) -> list[Place]:
        """Return the places in an answer, in order.

        Args:
            text: the answer.
            seen_size: width and height of what the model sees of the image, in pixels.
        """
        spans = [
            Place(SPAN, (float(match[1]), float(match[2])), label_before(text, match.start()))
            for match in SPAN_TEXT.finditer(text)
            if float(match[1]) <= float(match[2])
        ]
        return [*self.read_places(text, seen_size), *spans]

    def resolution(self, seen_size: tuple[float, float]) -> tuple[float, float]:
        """Return the step between two numbers, as shares of width and height."""
        if self.steps is None:
            return 1 / seen_size[0], 1 / seen_size[1]
        return (10**-self.decimals / self.steps,) * 2

    def numbers(self, place: Place) -> list[str]:
        """Return the coordinates of a place in the units of the convention."""
        numbers = []
        for index, share in enumerate(place.values):
            steps = self.steps or place.seen_size[index % 2]
            number = min(max(share, 0.0), 1.0) * steps
            highest = steps if self.highest is None else self.highest
            numbers.append(f"{min(self._round(number), highest):.{self.decimals}f}")
        return swap_axes(numbers) if self.is_y_first else numbers

    def _round(self, number: float) -> float:
        return round(number, self.decimals)

    def make_place(
        self, numbers: Iterable[str | float], seen_size: tuple[float, float], label: str | None = None
    ) -> Place | None:
        """Return the place of coordinates in the units of the convention, within the image.

        None if they are neither a box nor a point, or a box that ends before it begins.
        """
        values = [float(number) for number in numbers]
        kind = {NUM_VALUES[BOX]: BOX, NUM_VALUES[POINT]: POINT}.get(len(values))
        if kind is None:
            return None
        values = swap_axes(values) if self.is_y_first else values
        if kind == BOX and (values[2] < values[0] or values[3] < values[1]):
            return None
        shares = (value / (self.steps or seen_size[index % 2]) for index, value in enumerate(values))
        inside = tuple(min(max(share, 0.0), 1.0) for share in shares)
        return Place(kind, inside, (label or "").strip() or None, seen_size)


def swap_axes(numbers: Sequence[Number]) -> list[Number]:
    """Return `x, y, x, y` as `y, x, y, x`."""
    return [numbers[index + 1 - 2 * (index % 2)] for index in range(len(numbers))]


def label_before(text: str, start: int) -> str | None:
    """Return the label of a place on a line `label: place`, by the start of the place; None if there is none."""
    line = text[text.rfind("\n", 0, start) + 1 : start]
    match = LABEL_BEFORE.search(line)
    return match[1].strip() if match else None
