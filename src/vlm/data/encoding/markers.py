"""Markers around the texts of turns, which locate the texts in a rendered conversation.

Markers are characters that never occur in text. They are put around every text before a template renders it, and
removed from the result. So no habit of a template (dropping thinking, moving system turns, trimming) can shift a span.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.data.processor import Processor

MARKERS = OPEN, NUMBERED, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Unicode noncharacters that are put around the texts of turns while a template renders them."""
MARKER_PATTERN = re.compile(f"(?:([{OPEN}{CLOSE}])([0-9]+))?{NUMBERED}")
THINKING_END = "</think>"
WHITE_SPACE = re.compile(r"\s*")

Span = tuple[int, int]
"""The start and the end of a text, in characters."""
MarkedText = tuple[str, dict[int, Span]]
"""A rendered conversation without its markers, and the span of each numbered text."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    Attributes:
        text: the conversation as the template writes it.
        spoken: the spans of the texts of all turns, in order.
        replies: the spans of the assistant's texts that are trained on, in order.
        weights: of each of these, how much the loss of its tokens counts; empty if all count 1.
    """

    text: str
    spoken: list[Span]
    replies: list[Span]
    weights: tuple[float, ...] = ()


def add_markers(part: str, number: int, tokens: Sequence[str | None]) -> str:
    """Put markers around a text, and one more after its thinking, which some templates drop.

    White space at the ends stays outside, so that a template may trim it. If a user's text spells the token of an image
    or video, a marker breaks it up, so that a template does not mistake it for an image or video.
    """
    core, start = part.strip(), len(part) - len(part.lstrip())
    opened, closed = f"{OPEN}{number}{NUMBERED}", f"{CLOSE}{number}{NUMBERED}"
    text = core
    if (end := core.rfind(THINKING_END)) >= 0:
        behind = end_of_blanks(core, end + len(THINKING_END))
        text = f"{core[:behind]}{opened}{core[behind:]}"
    return f"{part[:start]}{opened}{break_media_tokens(text, tokens)}{closed}{part[start + len(core) :]}"


def break_media_tokens(text: str, tokens: Sequence[str | None]) -> str:
    """Return a text in which a marker breaks up tokens of images and videos."""
    for token in tokens:
        if token is not None:
            text = text.replace(token, f"{token[0]}{NUMBERED}{token[1:]}")
    return text


def strip_markers(marked: str) -> MarkedText:
    """Return the text without markers, and the span that each numbered pair of markers encloses."""
    pieces: list[str] = []
    length = position = 0
    opened: dict[int, int] = {}
    spans: dict[int, Span] = {}
    for match in MARKER_PATTERN.finditer(marked):
        pieces.append(marked[position : match.start()])
        length += match.start() - position
        position = match.end()
        number = int(match[2] or -1)
        if match[1] == OPEN:
            opened.setdefault(number, length)
        elif number in opened:
            spans[number] = (opened[number], length)
    return "".join([*pieces, marked[position:]]), spans


def reply_end(processor: Processor, text: str, end: int) -> int:
    """Return the end of a reply's last token: after the special token that follows it, else after white space.

    Raises:
        ValueError: neither follows; the template uses an end token that the tokenizer does not have.
    """
    behind_blanks = end_of_blanks(text, end)
    for start in (end, behind_blanks):
        if match := processor.special_tokens.match(text, start):
            return match.end()
    if behind_blanks == end:
        raise ValueError(
            f"the template ends a reply with {text[end : end + 20]!r}, which is no special token of the tokenizer. "
            "Choose the template that the language model was trained with (dataset.template=tokenizer)."
        )
    return behind_blanks


def end_of_blanks(text: str, start: int) -> int:
    """Return the end of the white space that begins at a position of a text."""
    match = WHITE_SPACE.match(text, start)
    assert match is not None
    return match.end()
