"""Make labels: from a conversation to ids, where exactly the replies are supervised, each with the token that ends it.

`encode` is where labels are made. `render` renders the conversation with the chat template, with markers (characters
that never occur in text) around every text. They give the character spans of the replies, so that no habit of a
template (dropping thinking blocks, moving system turns, trimming text) can shift the mask. The rendered text is
tokenised once, and a label is the id where a token lies in the span of a reply or of its end.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import count, pairwise
from operator import itemgetter
from pathlib import Path

from vlm.data.encoding.processor_errors import processor_errors
from vlm.data.processor import Processor
from vlm.data.sample import HALF_PAIR, BadSample, Clip, MediaSize, OverLong, Sample, Turn, has_surrogate

IGNORE_INDEX = -100
"""The label of a token that is not supervised."""
MARKERS = OPEN, NUMBERED, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Unicode noncharacters that are put around the texts of turns while a template renders them."""
MARKER_PATTERN = re.compile(f"(?:([{OPEN}{CLOSE}])([0-9]+))?{NUMBERED}")
THINKING_END = "</think>"
WHITE_SPACE = re.compile(r"\s*")

Tool = Mapping[str, object]
"""A tool that a model may call, as chat templates read it: a JSON object."""

Span = tuple[int, int]
"""Where a text begins and ends, in characters."""
MarkedText = tuple[str, dict[int, Span]]
"""A rendered conversation without its markers, and the span of each numbered text."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    Attributes:
        text: the conversation as the template writes it.
        spoken: the spans of the texts of all turns, in order.
        replies: the spans of the assistant's texts that are learned, in order.
    """

    text: str
    spoken: list[Span]
    replies: list[Span]


@dataclass(frozen=True)
class Encoded:
    """Ids and labels of one sample, both of length `tokens`."""

    input_ids: list[int]
    labels: list[int]


def get_media_token_ids(processor: Processor) -> list[int]:
    """Return the ids at whose positions features of images and videos are placed."""
    ids = processor.image_token_id, processor.video_token_id
    return [token_id for token_id in dict.fromkeys(ids) if token_id is not None]


def read_template(name: str) -> str:
    """Read a packaged template by name, or a `.jinja` file."""
    if name.endswith(".jinja"):
        return Path(name).read_text(encoding="utf-8")
    return resources.files("vlm.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def render(
    processor: Processor, turns: Sequence[Turn], sample_id: str = "?", *, prompt: bool = False,
    tools: Sequence[Tool] = (),
) -> Rendered:  # fmt: skip
    """Render turns with the processor's template; `prompt` adds the text that precedes an answer.

    `tools` are those that the model may call, for templates that list them.

    A template may drop a reply's text up to its last `</think>`; the reply is then the text after that.

    Raises:
        BadSample: the template refuses the turns, or drops a reply.
    """
    texts = [(turn.role, part) for turn in turns for part in turn.content if isinstance(part, str)]
    learned = [turn.supervised for turn in turns for part in turn.content if isinstance(part, str)]
    if any(marker in part for _, part in texts for marker in MARKERS):
        raise BadSample(sample_id, "contains one of the Unicode noncharacters U+FDD0 to U+FDD2")
    text, spans = _render_with_markers(processor, turns, sample_id, prompt, tools)
    whitespace = {}
    if any(role == "assistant" and part != part.strip() for role, part in texts):
        without_blanks = [_strip_reply(turn) for turn in turns]
        stripped = _render_with_markers(processor, without_blanks, sample_id, prompt, tools)
        whitespace = _kept_whitespace((text, spans), stripped)
    replies = []
    for number, (role, part) in enumerate(texts):
        if role == "assistant":
            if number not in spans:
                raise BadSample(sample_id, f"its template drops the reply {part[:60]!r}")
            own = len(part) - len(part.lstrip()), len(part) - len(part.rstrip())  # not that of the reply beside it
            before, after = map(min, own, whitespace.get(number, (0, 0)))
            if learned[number]:
                replies.append((spans[number][0] - before, spans[number][1] + after))
    return Rendered(text, sorted(spans.values()), replies)


def _render_with_markers(
    processor: Processor, turns: Sequence[Turn], sample_id: str, prompt: bool, tools: Sequence[Tool]
) -> MarkedText:
    """Render with markers around each text, and take them out."""
    return _strip_markers(render_marked(processor, turns, sample_id, prompt=prompt, tools=tools))


def render_marked(
    processor: Processor, turns: Sequence[Turn], sample_id: str, *, prompt: bool = False, tools: Sequence[Tool] = ()
) -> str:
    """Render with markers around each text.

    Raises:
        BadSample: the template refuses the turns.
    """
    numbers, tokens = count(), (processor.image_token, processor.video_token)
    messages = []
    for turn in turns:
        parts = tuple(_add_markers(p, next(numbers), tokens) if isinstance(p, str) else p for p in turn.content)
        messages.append(replace(turn, content=parts).as_message(*tokens))
    with processor_errors("its template", sample_id):
        if tools:
            return processor.apply_chat_template(messages, add_generation_prompt=prompt, tools=list(tools))
        return processor.apply_chat_template(messages, add_generation_prompt=prompt)


def _add_markers(part: str, number: int, tokens: Sequence[str | None]) -> str:
    """Put markers around a text, and one more behind its thinking, which some templates drop.

    White space at the ends stays outside, where a template may trim it. A token of an image or video that a user
    spelled is broken up by a marker, so that a template does not take it for an image or video.
    """
    core, start = part.strip(), len(part) - len(part.lstrip())
    opened, closed = f"{OPEN}{number}{NUMBERED}", f"{CLOSE}{number}{NUMBERED}"
    text = core
    if (end := core.rfind(THINKING_END)) >= 0:
        behind = end_of_blanks(core, end + len(THINKING_END))
        text = f"{core[:behind]}{opened}{core[behind:]}"
    for token in tokens:
        if token is not None:
            text = text.replace(token, f"{token[0]}{NUMBERED}{token[1:]}")
    return f"{part[:start]}{opened}{text}{closed}{part[start + len(core) :]}"


def _strip_markers(marked: str) -> MarkedText:
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


def _strip_reply(turn: Turn) -> Turn:
    """Return a reply without the white space at its ends; any other turn unchanged."""
    if turn.role != "assistant":
        return turn
    return replace(turn, content=tuple(part.strip() if isinstance(part, str) else part for part in turn.content))


def _kept_whitespace(full: MarkedText, stripped: MarkedText) -> dict[int, tuple[int, int]]:
    """Return how much white space the template kept before and after each text.

    It is the difference between the gaps around a text rendered in full and rendered without that white space.
    """
    gaps, stripped_gaps = _span_gaps(*full), _span_gaps(*stripped)
    return {
        number: (gaps[number][0] - stripped_gaps[number][0], gaps[number][1] - stripped_gaps[number][1])
        for number in gaps.keys() & stripped_gaps.keys()
    }


def _span_gaps(text: str, spans: dict[int, Span]) -> dict[int, tuple[int, int]]:
    """Return the number of characters between each span and its predecessor, and its successor."""
    order = sorted(spans.items(), key=itemgetter(1))
    ends = [0, *(end for _, (_, end) in order)]
    starts = [*(start for _, (start, _) in order), len(text)]
    gaps = [start - end for end, start in zip(ends, starts, strict=True)]
    return {number: around for (number, _), around in zip(order, pairwise(gaps), strict=True)}


def reply_end(processor: Processor, text: str, end: int) -> int:
    """Return the end of a reply's last token: behind the special token that follows it, else behind white space.

    Raises:
        ValueError: neither follows; the template needs a token that the tokenizer does not know.
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


def reply_ending(processor: Processor) -> str:
    """Return what the chat template writes behind a reply, without blanks before it: a special token or white space.

    Raises:
        ValueError: neither follows, see `reply_end`, or the template refuses a question with its answer.
    """
    rendered = render(processor, [Turn("user", ("?",)), Turn("assistant", ("!",))])
    end = rendered.replies[-1][1]
    return rendered.text[end : reply_end(processor, rendered.text, end)].lstrip(" ")


def end_of_blanks(text: str, start: int) -> int:
    """Return where the white space ends that begins at a place of a text."""
    match = WHITE_SPACE.match(text, start)
    assert match is not None
    return match.end()


Labeller = Callable[[Processor, Rendered, Sequence[int], Sequence[Span]], list[int]]
"""Makes labels, `(tokens,)`, of a rendered conversation, its ids and the span of characters that each id comes from."""


def label_replies(processor: Processor, rendered: Rendered, ids: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """Return the id within replies and their ends, -100 elsewhere."""
    text = rendered.text
    # A reply begins at the blank before it, without which prompts end (`ASSISTANT:`).
    supervised = [
        (start - text.endswith(" ", 0, start), reply_end(processor, text, end)) for start, end in rendered.replies
    ]
    labels = [IGNORE_INDEX] * len(ids)
    remaining = iter([*supervised, (len(text) + 1,) * 2])
    start, stop = next(remaining)
    for position, (a, b) in enumerate(spans):
        while a >= stop:
            start, stop = next(remaining)
        if b > start and a < stop:
            labels[position] = ids[position]
    return labels


def encode(
    processor: Processor,
    sample: Sample,
    sizes: Sequence[MediaSize] = (),
    label: Labeller = label_replies,
    render: Callable[[Processor, Sequence[Turn], str], Rendered] = render,
) -> Encoded:
    """Return the ids of a whole conversation, and its labels, which `label` makes; `render` renders it.

    A reply that is not `supervised` has no labels.

    Sizes are those of its images and videos, where the processor needs them (`vision.images.media_sizes_from_opened`).

    Raises:
        BadSample: there is no reply, the template refuses the turns or drops one, or nothing would be supervised.
    """
    if problem := sample.reply_problem:
        raise BadSample(sample.id, problem)
    rendered = render(processor, sample.turns, sample.id)
    ids, spans = tokenize(processor, rendered, sample, sizes)
    labels = label(processor, rendered, ids, spans)
    if labels.count(IGNORE_INDEX) == len(labels):
        raise BadSample(sample.id, "no supervised token")
    return Encoded(ids, labels)


def encode_prompt(
    processor: Processor, turns: Sequence[Turn], sizes: Sequence[MediaSize] = (), sample_id: str = "?",
    tools: Sequence[Tool] = (),
) -> list[int]:  # fmt: skip
    """Return the ids of a conversation that waits for an answer; `tools` are those that the model may call."""
    rendered = render(processor, turns, sample_id, prompt=True, tools=tools)
    return tokenize(processor, rendered, Sample(sample_id, tuple(turns)), sizes)[0]


def tokenize(
    processor: Processor, rendered: Rendered, sample: Sample, sizes: Sequence[MediaSize] = ()
) -> tuple[list[int], list[Span]]:
    """Return the ids of a rendered sample, and the characters that each comes from; arguments as of `encode`.

    Raises:
        BadSample: the processor refuses the text, or the size of an image or video.
    """

    def tokenize_one(index: int) -> object:
        """Tokenize the placeholder of one medium, to find out which of them the processor refuses."""
        token = processor.video_token if isinstance(sizes[index], Clip) else processor.image_token
        return processor.tokenize(str(token), (), sizes[index : index + 1])

    if has_surrogate(rendered.text):
        raise BadSample(sample.id, f"what the chat template writes {HALF_PAIR}")
    with processor_errors("the processor", sample.id, sample.media, tokenize_one if sizes else None):
        return processor.tokenize(rendered.text, rendered.spoken, sizes)


SMALLER_IMAGES = "; dataset.max_image_tokens bounds the tokens of an image"
"""What may be done about a sample with images that is too long, where their tokens depend on their sizes."""


def limit_length(
    encoded: Encoded, longest: int, media: Sequence[int], sample_id: str, *, truncate: bool, hint: str = ""
) -> Encoded:
    """Return the sample if it has at most `longest` tokens; with `truncate`, its beginning.

    The beginning ends within a reply or with one: the start of an unanswered question is cut too, unless an image
    stands in it. `media` are the ids of images and videos; `hint` says what may be done.

    Raises:
        OverLong: it is longer, or cutting it would cut an image or every reply.
    """
    length = len(encoded.input_ids)
    if length <= longest:
        return encoded
    if not truncate:
        limit = f"at most {longest} are allowed (dataset.max_length, or the language model's positions)"
        raise OverLong(sample_id, f"{length} tokens, {limit}{hint}")
    cut = Encoded(encoded.input_ids[:longest], encoded.labels[:longest])
    if not set(media).isdisjoint(encoded.input_ids[longest:]):
        raise OverLong(sample_id, f"{length} tokens: cutting it to {longest} would cut an image{hint}")
    if cut.labels.count(IGNORE_INDEX) == longest:
        raise OverLong(sample_id, f"{length} tokens: cutting it to {longest} would cut every reply")
    while cut.labels[-1] == IGNORE_INDEX and cut.input_ids[-1] not in media:
        cut.input_ids.pop()
        cut.labels.pop()
    return cut
