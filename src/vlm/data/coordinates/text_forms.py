"""Conventions of plain text: LLaVA's shares, pixels, and the points of Molmo and Molmo 2."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape, unescape
from itertools import count, groupby

from vlm.data.coordinates.convention import NUMBER, Convention, Place, label_before
from vlm.data.objects import POINT


class TextConvention(Convention):
    """`[x1, y1, x2, y2]`; in a list of objects each on a line of its own, `cat: [x1, y1, x2, y2]`."""

    _list = re.compile(rf"\[\s*{NUMBER}(?:\s*,\s*{NUMBER})*\s*\]")

    def write_place(self, place: Place) -> str:
        """Return `[x1, y1, x2, y2]`, or `[x, y]`."""
        return f"[{', '.join(self.numbers(place))}]"

    def write_list(self, places: Sequence[Place]) -> str:
        """Return a line for each place."""
        return "\n".join(map(self._labelled_line, places))

    def read_places(self, text: str, seen_size: tuple[float, float]) -> Iterator[Place]:
        """Yield the boxes and points of an answer; see `Convention`."""
        for match in self._list.finditer(text):
            label = label_before(text, match.start())
            place = self.make_place(re.findall(NUMBER, match[0]), seen_size, label)
            if place is not None:
                yield place


class Llava(TextConvention):
    """Shares of what the model sees, with two decimals; if images are padded to a square, shares of the square."""

    name = "llava"
    source = "Liu et al. 2023, arXiv:2310.03744, appendix; github.com/haotian-liu/LLaVA/issues/606: after expand2square"
    steps = 1
    decimals = 2


class Pixels(TextConvention):
    """Whole pixels of the stored image turned upright, whatever the model sees of it."""

    name = "pixels"
    source = "plain text; no family's own"
    steps = None
    sees_stored_image = True


class Molmo(Convention):
    """`<point x="63.5" y="44.5" alt="cat">cat</point>` in hundredths of the sides; it has no boxes."""

    name = "molmo"
    source = "Deitke et al. 2024, arXiv:2409.17146, section 3; the card of allenai/Molmo-7B-D-0924"
    steps = 100
    decimals = 1
    _answer = re.compile(r"<points?\b([^<>]*)>(?:([^<>]*)</points?>)?")
    _coordinate = re.compile(rf'\b[xy]\d*\s*=\s*"\s*({NUMBER})\s*"')

    def write_place(self, place: Place) -> str:
        """Return a point; ValueError for a box."""
        return self._write_points([place])

    def write_list(self, places: Sequence[Place]) -> str:
        """Return an element for each run of points of one label."""
        return "\n".join(self._write_points(list(run)) for _, run in groupby(places, lambda place: place.label))

    def _write_points(self, places: Sequence[Place]) -> str:
        if any(place.kind != POINT for place in places):
            raise ValueError("Molmo writes points, not boxes: give points, or choose another convention")
        return self._write_element(places, escape(places[0].label or ""))

    def _write_element(self, places: Sequence[Place], label: str) -> str:
        pairs = [self.numbers(place) for place in places]
        if len(pairs) == 1:
            return f'<point x="{pairs[0][0]}" y="{pairs[0][1]}" alt="{label}">{label}</point>'
        values = " ".join(f'x{number}="{x}" y{number}="{y}"' for number, (x, y) in enumerate(pairs, start=1))
        return f'<points {values} alt="{label}">{label}</points>'

    def read_places(self, text: str, seen_size: tuple[float, float]) -> Iterator[Place]:
        """Yield the points of an answer; see `Convention`."""
        for match in self._answer.finditer(text):
            numbers = self._coordinate.findall(match[1])
            for pair in zip(numbers[::2], numbers[1::2], strict=False):
                place = self.make_place(pair, seen_size, unescape(match[2] or ""))
                if place is not None:
                    yield place


class Molmo2(Molmo):
    """`<points coords="1 1 250 500 2 700 300">cat</points>`: the number of the image, then each point's own, x and y.

    They are in thousandths of the sides; points of several images are separated by semicolons. It has no boxes.
    """

    name = "molmo2"
    source = "Clark et al. 2026, arXiv:2601.10611; the code that reads points on the card of allenai/Molmo2-4B"
    steps = 1000
    decimals = 0
    _coords = re.compile(r'\bcoords\s*=\s*"([^"]*)"')
    _image = re.compile(r"(?:^|[\t:,;])\s*(\d+) ([\d ]+)")
    _point = re.compile(r"(\d+) (\d{1,4}) (\d{1,4})(?!\d)")

    def _write_element(self, places: Sequence[Place], label: str) -> str:
        by_image: dict[int, list[str]] = {}
        for place in sorted(places, key=lambda place: place.medium or 0):
            by_image.setdefault(place.medium or 0, []).append(" ".join(text.zfill(3) for text in self.numbers(place)))
        number = count(1)
        images = (
            f"{image + 1} {' '.join(f'{next(number)} {point}' for point in points)}"
            for image, points in by_image.items()
        )
        return f'<points coords="{";".join(images)}">{label}</points>'

    def read_places(self, text: str, seen_size: tuple[float, float]) -> Iterator[Place]:
        """Yield the points of an answer, each with the number of its image; see `Convention`."""
        for match in self._answer.finditer(text):
            groups = (found for coords in self._coords.findall(match[1]) for found in self._image.findall(coords))
            for image, points in groups:
                for _, x, y in self._point.findall(points):
                    place = self.make_place((x, y), seen_size, unescape(match[2] or ""))
                    if place is not None:
                        yield replace(place, medium=max(int(image) - 1, 0))
