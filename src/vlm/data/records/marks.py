"""Marks: `<image>` and `<video>` in the texts of records and prompts, which stand for an image or a video.

A mark is found by the media that there are, not by its spelling alone: without media, and in excess of media where it
is within a sentence, it is text. `docs/data.md` states the rule. Imports the standard library and `sample` only.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar, cast

from vlm.data.sample import PLACEHOLDER, VIDEO_PLACEHOLDER

Part = TypeVar("Part")
MARK_PATTERN = re.compile(f"{PLACEHOLDER}|{VIDEO_PLACEHOLDER}")
MEDIA_NAMES = {PLACEHOLDER: "image", VIDEO_PLACEHOLDER: "video"}
SENTENCE_ENDS = (".", "?", "!", ":", "\u3002", "\uff1f", "\uff01", "\uff1a")
"""Full stop, question mark, exclamation mark and colon, also as Chinese and Japanese write them."""


class MarkError(ValueError):
    """Marks that do not fit the media.

    Args:
        mark: the mark, as it is spelled.
        found: how many there are.
        name: `image` or `video`.
        number: how many images or videos there are.
    """

    def __init__(self, mark: str, found: int, name: str, number: int):
        advice = f"write one {mark} for each, on a line of its own if the text also has the word {mark}"
        if not number:
            advice = f"name the {name} in the record, or write {mark} within a sentence if it is a word"
        plural = "" if number == 1 else "s"
        super().__init__(
            f"its text has {found or 'no'} {mark}, but the record has {number or 'no'} {name}{plural}: {advice}"
        )
        self.mark, self.found, self.name, self.number = mark, found, name, number


@dataclass(frozen=True)
class Mark:
    """A mark in one of several texts.

    Attributes:
        text: the index of its text.
        start: its first character.
        end: the character after it.
        spelling: `<image>` or `<video>`.
        alone: whether it begins its text, fills a line, or ends its text after a sentence, alone or with other marks.
        outer: whether it fills the first or the last line of its text.
    """

    text: int
    start: int
    end: int
    spelling: str
    alone: bool
    outer: bool


@dataclass(frozen=True)
class Slot:
    """A place in a text: `kind` tells what is there, an image (`<image>`) or a video, and `spelling` its mark."""

    kind: str
    spelling: str


def find_marks(texts: Sequence[str]) -> list[Mark]:
    """Return the marks of texts, in order."""
    marked = [(number, text) for number, text in enumerate(texts) if "<" in text]
    return [mark for number, text in marked for mark in _find_text_marks(number, text)]


def _find_text_marks(number: int, text: str) -> list[Mark]:
    matches = list(MARK_PATTERN.finditer(text))
    edges = [0, *(edge for match in matches for edge in match.span()), len(text)]
    gaps = [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    joined = [not gap.strip() and "\n" not in gap for gap in gaps[1:-1]]  # marks with blanks between them are one run
    runs = [0] if matches else []
    for is_joined in joined:
        runs.append(runs[-1] + (not is_joined))
    marks = []
    for _, places in groupby(range(len(matches)), key=runs.__getitem__):
        run = list(places)
        alone, outer = _standing(gaps, run[0], run[-1] + 1)
        marks += [Mark(number, *matches[place].span(), matches[place][0], alone, outer) for place in run]
    return marks


def _standing(gaps: Sequence[str], left: int, right: int) -> tuple[bool, bool]:
    """Return whether marks between two gaps of their text stand alone, and whether they fill its first or last line."""
    before, after = gaps[left], gaps[right]
    begins, ends = left == 0 and not before.strip(), right == len(gaps) - 1 and not after.strip()
    opens_line = begins or ("\n" in before and not before.rpartition("\n")[2].strip())
    closes_line = ends or ("\n" in after and not after.partition("\n")[0].strip())
    behind_sentence = ends and before.rstrip().endswith(SENTENCE_ENDS)
    fills_line = opens_line and closes_line
    return begins or fills_line or behind_sentence, fills_line and (begins or ends)


def split_at_marks(
    texts: Sequence[str], numbers: Mapping[str, int], *, lead: bool = False, every_mark: bool = False
) -> tuple[list[list[str | Slot]], list[str]]:
    """Split texts at the marks that stand for media; other marks are text.

    Args:
        texts: the texts, in order; a single one with `lead`.
        numbers: how many images (`<image>`) and videos (`<video>`) are in the texts.
        lead: whether media without marks come before the text. The mark of a single image or video is then a word if
            it is within a sentence.
        every_mark: whether the mark of a single image or video stands for it within a sentence too.

    Returns:
        The pieces of each text, and the kinds of media that come before the text.

    Raises:
        MarkError: marks and media do not fit.
    """
    marks: dict[str, list[Mark]] = {spelling: [] for spelling in numbers}
    for mark in find_marks(texts):
        marks[mark.spelling].append(mark)
    if numbers[VIDEO_PLACEHOLDER] and not numbers[PLACEHOLDER] and not marks[VIDEO_PLACEHOLDER]:
        # In LLaVA's records of videos, <image> is the mark of a video.
        marks = {PLACEHOLDER: [], VIDEO_PLACEHOLDER: marks[PLACEHOLDER]}
    may_be_words = sum(numbers.values()) == 1 and not every_mark
    leading: list[str] = []
    slots: list[list[tuple[Mark, Slot]]] = [[] for _ in texts]
    for kind, number in numbers.items():
        if lead and number and not (any(mark.alone for mark in marks[kind]) if may_be_words else marks[kind]):
            leading.append(kind)
            continue
        for mark in _choose(marks[kind], number, kind):
            slots[mark.text].append((mark, Slot(kind, mark.spelling)))
    return [_split(text, sorted(own, key=_mark_start)) for text, own in zip(texts, slots, strict=True)], leading


def _choose(marks: Sequence[Mark], number: int, kind: str) -> Sequence[Mark]:
    """Return the marks that stand for a number of media; raise MarkError if they do not fit."""
    alone = [mark for mark in marks if mark.alone]
    if number and len(marks) == number:
        return marks
    if number and len(alone) == number:
        return alone
    if number or any(mark.outer for mark in marks):
        raise MarkError(marks[0].spelling if marks else kind, len(marks), MEDIA_NAMES[kind], number)
    return []


def _mark_start(placed: tuple[Mark, Slot]) -> int:
    return placed[0].start


def _split(text: str, slots: Sequence[tuple[Mark, Slot]]) -> list[str | Slot]:
    pieces: list[str | Slot] = []
    end = 0
    for mark, slot in slots:
        pieces += [text[end : mark.start], slot]
        end = mark.end
    return [piece for piece in (*pieces, text[end:]) if piece]


def move_image_first(pieces: Sequence[str | Slot]) -> list[str | Slot]:
    """Return the pieces of a turn with its only `<image>` at its start, as LLaVA moves it."""
    places = [place for place, piece in enumerate(pieces) if isinstance(piece, Slot) and piece.spelling == PLACEHOLDER]
    if len(places) != 1:
        return list(pieces)
    rest = join_texts([piece for place, piece in enumerate(pieces) if place != places[0]])
    if rest and isinstance(rest[0], str):
        rest[0] = rest[0].lstrip()
    if rest and isinstance(rest[-1], str):
        rest[-1] = rest[-1].rstrip()
    rest = [piece for piece in rest if piece]
    return [pieces[places[0]], *(join_texts(["\n", *rest]) if rest else [])]


def join_texts(parts: Sequence[Part]) -> list[Part]:
    """Return parts with adjoining texts joined."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(last := joined[-1], str):
            joined[-1] = cast(Part, last + part)
        else:
            joined.append(part)
    return joined


# Marks of other tools

BOX_MARKS = re.compile(r"<bbox>|<ref-object>")
"""Marks that stand for boxes and for the names of objects; ms-swift uses the same ones (see `records.objects`)."""
FILE_MARK = r"<img>(?=[^<>\s]*[./])[^<>\s]*</img>"  # the lookahead keeps it linear in the text
OTHER_MARKS = re.compile(
    rf"{FILE_MARK}|<\|(?:image|video|audio|vision|img)\w*\|>|<ImageHere>|<IMG_CONTEXT>|<audio>"
    r"|<image[-_]placeholder>|<image[ _]\d+>"
)
"""Marks of images, videos and sounds in records for other tools."""


def find_other_mark(text: str, *, has_media: bool) -> str | None:
    """Return a mark of another tool in a text that has no marks of ours, None if there is none.

    With media, every such mark counts; without media, only one that names a file, begins the text or fills a line.
    """
    if "<" not in text:  # each of them begins with it
        return None
    if has_media:
        match = OTHER_MARKS.search(text)
    else:
        lines = (line for line in text.splitlines() if not OTHER_MARKS.sub("", line).strip())
        alone = next(filter(None, map(OTHER_MARKS.search, lines)), None)
        match = re.search(FILE_MARK, text) or OTHER_MARKS.match(text.lstrip()) or alone
    return None if match is None else match[0]
