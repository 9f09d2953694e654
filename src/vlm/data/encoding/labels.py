"""From a conversation to ids and labels: exactly the replies are supervised, each with the token that ends it.

Works on any processor whose `apply_chat_template` renders messages and whose `tokenize` gives ids with character
spans. The replies are found in the rendered text by marks around them, so that no template's habits (thinking blocks
dropped, system turns moved, text trimmed) can shift the mask, and nothing is tokenised twice.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import jinja2

from vlm.data.sample import BadSample, MediaSize, OverLong, Sample, Turn

IGNORE_INDEX = -100
MARKERS = OPEN, NUMBERED, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Unicode noncharacters around what people said while a template renders it; they never occur in text."""
MARKER_PATTERN = re.compile(f"(?:([{OPEN}{CLOSE}])([0-9]+))?{NUMBERED}")
THINKING_PATTERN = re.compile(r".*</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation, with the character spans of what people said and of the replies in it."""

    text: str
    spoken: list[tuple[int, int]]
    replies: list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """Ids and labels of one sample, both of length `tokens`."""

    input_ids: list[int]
    labels: list[int]


def get_media_token_ids(processor: Any) -> list[int]:
    """The ids that stand for features of pictures and videos."""
    ids = processor.image_token_id, processor.video_token_id
    return [one for one in dict.fromkeys(ids) if one is not None]


def read_template(name: str) -> str:
    """A packaged template by name, or the text of a `.jinja` file."""
    if name.endswith(".jinja"):
        return Path(name).read_text(encoding="utf-8")
    return resources.files("vlm.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


@cache
def template_names() -> list[str]:
    """The packaged templates."""
    files = resources.files("vlm.data").joinpath("templates").iterdir()
    return sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja"))


def render(processor: Any, turns: Sequence[Turn], sample_id: str = "?", *, prompt: bool = False) -> Rendered:
    """Render turns with the processor's template; `prompt` adds what precedes an answer.

    A template may drop what a reply says up to its last `</think>`; the rest is the reply then.

    Raises:
        BadSample: the template refuses the turns, or drops a reply.
    """
    said = [(turn.role, part) for turn in turns for part in turn.content if isinstance(part, str)]
    if any(mark in part for _, part in said for mark in MARKERS):
        raise BadSample(sample_id, "contains one of the Unicode noncharacters U+FDD0 to U+FDD2")
    text, spans = _render_with_markers(processor, turns, sample_id, prompt)
    kept = {}
    if any(role == "assistant" and part != part.strip() for role, part in said):
        bare = _render_with_markers(processor, [_strip_replies(turn) for turn in turns], sample_id, prompt)
        kept = _kept_whitespace((text, spans), bare)
    replies = []
    for number, (role, part) in enumerate(said):
        if role == "assistant":
            if number not in spans:
                raise BadSample(sample_id, f"its template drops the reply {part[:60]!r}")
            before, after = kept.get(number, (0, 0))
            replies.append((spans[number][0] - before, spans[number][1] + after))
    return Rendered(text, sorted(spans.values()), replies)


def _render_with_markers(
    processor: Any, turns: Sequence[Turn], sample_id: str, prompt: bool
) -> tuple[str, dict[int, tuple[int, int]]]:
    """Render with marks around each text; the rendered text without them, and where each numbered text stands."""
    numbers, tokens = count(), (processor.image_token, processor.video_token)
    marked = [
        Turn(
            turn.role, tuple(_add_markers(p, next(numbers), tokens) if isinstance(p, str) else p for p in turn.content)
        )
        for turn in turns
    ]
    messages = [turn.as_message(*tokens) for turn in marked]
    try:
        return _strip_markers(processor.apply_chat_template(messages, add_generation_prompt=prompt))
    except jinja2.TemplateError as error:
        raise BadSample(sample_id, f"its template refuses it: {error}") from error


def _add_markers(part: str, number: int, tokens: Sequence[str | None]) -> str:
    """Marks around the text proper, and once more behind its thinking, which some templates drop.

    Blanks at the ends stay outside, where a template may trim them. A token of a picture or video that somebody spelled
    is broken up by a mark, so that a template does not take it for one.
    """
    core = part.strip()
    start = part.index(core) if core else len(part)
    opened, closed = f"{OPEN}{number}{NUMBERED}", f"{CLOSE}{number}{NUMBERED}"
    text = THINKING_PATTERN.sub(lambda thinking: thinking[0] + opened, core, count=1)
    for token in tokens:
        if token is not None:
            text = text.replace(token, f"{token[0]}{NUMBERED}{token[1:]}")
    return f"{part[:start]}{opened}{text}{closed}{part[start + len(core) :]}"


def _strip_markers(marked: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """The text without marks, and the span that each numbered pair of marks enclosed."""
    text, position = "", 0
    opened: dict[int, int] = {}
    spans: dict[int, tuple[int, int]] = {}
    for match in MARKER_PATTERN.finditer(marked):
        text += marked[position : match.start()]
        position = match.end()
        number = int(match[2] or -1)
        if match[1] == OPEN:
            opened.setdefault(number, len(text))
        elif number in opened:
            spans[number] = (opened[number], len(text))
    return text + marked[position:], spans


def _strip_replies(turn: Turn) -> Turn:
    """A reply without the blanks at its ends; other turns as they are."""
    if turn.role != "assistant":
        return turn
    return Turn(turn.role, tuple(part.strip() if isinstance(part, str) else part for part in turn.content))


def _kept_whitespace(
    full: tuple[str, dict[int, tuple[int, int]]], bare: tuple[str, dict[int, tuple[int, int]]]
) -> dict[int, tuple[int, int]]:
    """How many blanks at the ends of each text the template kept: what its neighbours are further away for them."""
    (gaps, bare_gaps) = (_span_gaps(text, spans) for text, spans in (full, bare))
    return {
        number: (before - bare_gaps[number][0], after - bare_gaps[number][1])
        for number, (before, after) in gaps.items()
        if number in bare_gaps
    }


def _span_gaps(text: str, spans: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Characters between each span and the one before it, and the one after it."""
    order = sorted(spans, key=lambda number: spans[number])
    ends = [0, *(spans[number][1] for number in order)]
    starts = [*(spans[number][0] for number in order), len(text)]
    return {
        number: (spans[number][0] - ends[place], starts[place + 1] - spans[number][1])
        for place, number in enumerate(order)
    }


def reply_start(text: str, start: int) -> int:
    """Where what a model writes begins: with the blank before a reply, which prompts end without (`ASSISTANT:`)."""
    return start - text[:start].endswith(" ")


def reply_end(processor: Any, text: str, end: int) -> int:
    """Where the end of a reply is over: behind the special token that follows it, else behind the white space.

    Raises:
        ValueError: neither follows; the template needs a token that the tokenizer does not know.
    """
    if match := processor.special_tokens.match(text, end):
        return match.end()
    rest = text[end:]
    blank = len(rest) - len(rest.lstrip())
    if match := processor.special_tokens.match(text, end + blank):
        return match.end()
    if not blank:
        raise ValueError(
            f"the template ends a reply with {rest[:20]!r}, which is no special token of the tokenizer. Choose the "
            "template that the language model was trained with (dataset.template=tokenizer)."
        )
    return end + blank


def encode(processor: Any, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
    """Ids of a whole conversation, and labels: the id within replies and their ends, -100 elsewhere.

    Args:
        processor: decides every token.
        sample: the conversation.
        sizes: of its pictures and videos, where the processor needs them; see `pictures.media_sizes_from_opened`.

    Raises:
        BadSample: there is no reply, the template refuses the turns or drops one, or nothing would be supervised.
    """
    if not any(turn.role == "assistant" for turn in sample.turns):
        raise BadSample(sample.id, "no reply to learn from")
    rendered = render(processor, sample.turns, sample.id)
    text = rendered.text
    supervised = [(reply_start(text, start), reply_end(processor, text, end)) for start, end in rendered.replies]
    ids, spans = processor.tokenize(text, rendered.spoken, sizes)
    labels = [IGNORE_INDEX] * len(ids)
    waiting = iter([*supervised, (len(text) + 1,) * 2])
    start, stop = next(waiting)
    for position, (a, b) in enumerate(spans):
        while a >= stop:
            start, stop = next(waiting)
        if b > start and a < stop:
            labels[position] = ids[position]
    if labels.count(IGNORE_INDEX) == len(labels):
        raise BadSample(sample.id, "no supervised token")
    return Encoded(ids, labels)


def encode_prompt(processor: Any, turns: Sequence[Turn], sizes: Sequence[MediaSize] = ()) -> list[int]:
    """Ids of a conversation that waits for an answer."""
    rendered = render(processor, turns, prompt=True)
    return processor.tokenize(rendered.text, rendered.spoken, sizes)[0]


def limit_length(encoded: Encoded, longest: int, media: Sequence[int], sample_id: str, *, truncate: bool) -> Encoded:
    """The sample if it has at most `longest` tokens; with `truncate`, its beginning.

    The beginning ends within a reply or with one: what would be left of a question that is not answered goes too,
    unless an image stands in it. `media` are the ids of images and videos.

    Raises:
        OverLong: it is longer, or cutting it would cut an image or every reply.
    """
    length = len(encoded.input_ids)
    if length <= longest:
        return encoded
    if not truncate:
        raise OverLong(
            sample_id,
            f"{length} tokens, at most {longest} are allowed (dataset.max_length, or the language model's positions)",
        )
    cut = Encoded(encoded.input_ids[:longest], encoded.labels[:longest])
    if not set(media).isdisjoint(encoded.input_ids[longest:]):
        raise OverLong(sample_id, f"{length} tokens: cutting it to {longest} would cut an image")
    if cut.labels.count(IGNORE_INDEX) == longest:
        raise OverLong(sample_id, f"{length} tokens: cutting it to {longest} would cut every reply")
    while cut.labels[-1] == IGNORE_INDEX and cut.input_ids[-1] not in media:
        cut.input_ids.pop()
        cut.labels.pop()
    return cut
