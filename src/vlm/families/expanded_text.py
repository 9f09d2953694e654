"""A rendered conversation in which what stands for images and videos takes the place of their tokens."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class ExpandedText:
    """A text with expansions.

    Attributes:
        text: the text with expansions.
        replaced: (start, end, expansion) of each token of an image or video in the rendered text.
        cuts: where special tokens that users spelled are split, in `text`.
    """

    text: str
    replaced: list[tuple[int, int, str]]
    cuts: list[int]

    def map_to_rendered(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Map spans of the text to the rendered one; those within an expansion become its token's span."""
        mapped = []
        remaining = iter([*self.replaced, None])
        image = next(remaining)
        shift = 0
        for a, b in spans:
            while image is not None and a - shift >= image[0] + len(image[2]):
                shift += len(image[2]) - (image[1] - image[0])
                image = next(remaining)
            if image is not None and b - shift > image[0]:
                mapped.append((min(a - shift, image[0]), image[1]))
            else:
                mapped.append((a - shift, b - shift))
        return mapped


def expand_text(
    text: str, places: Sequence[tuple[int, int]], expansions: Sequence[str], cuts: Sequence[int]
) -> ExpandedText:
    """Put expansions in the place of the tokens of images and videos in a rendered text.

    Args:
        text: the rendered text.
        places: start and end of each such token, in order.
        expansions: what takes the place of each.
        cuts: where special tokens that users spelled are split, in the rendered text.
    """
    replaced = [(start, end, new) for (start, end), new in zip(places, expansions, strict=True)]
    ends = [end for _, end, _ in replaced]
    shifts = [0, *accumulate(len(new) - (end - start) for start, end, new in replaced)]
    moved = [cut + shifts[bisect_right(ends, cut)] for cut in cuts]
    pieces, last = [], 0
    for start, end, new in replaced:
        pieces += [text[last:start], new]
        last = end
    return ExpandedText("".join([*pieces, text[last:]]), replaced, moved)
