"""Encodes a conversation as ids and labels: exactly the replies are supervised, each with the token that ends it.

`encode` makes the labels. `render` renders the conversation with the chat template, with markers (characters
that never occur in text) around every text. They give the character spans of the replies, so that no habit of a
template (dropping thinking blocks, moving system turns, trimming text) can shift the mask. The rendered text is
tokenised once, and a label is the id where a token is in the span of a reply or of its end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import count, groupby, pairwise
from operator import itemgetter
from pathlib import Path

from vlm.data.encoding.loss_weights import ALL_ONE, LossWeights
from vlm.data.encoding.markers import (
    MARKERS,
    MarkedText,
    Rendered,
    Span,
    add_markers,
    reply_end,
    strip_markers,
)
from vlm.data.encoding.processor_errors import processor_errors
from vlm.data.encoding.whole_turns import needs_whole_turns, render_whole_turns
from vlm.data.processor import Processor
from vlm.data.sample import BadSample, Clip, MediaSize, OverLong, Sample, Turn
from vlm.data.surrogates import HALF_PAIR, has_surrogate

IGNORE_INDEX = -100
"""The label of a token that is not supervised."""
Tool = Mapping[str, object]
"""A tool that a model may call, as chat templates read it: a JSON object."""


@dataclass(frozen=True)
class Encoded:
    """Ids and labels of one sample, both of length `tokens`.

    Attributes:
        input_ids: the ids.
        labels: the id at each token that is supervised, -100 elsewhere.
        weights: how much the loss of each label counts; None if all count 1.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


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
    processor: Processor,
    turns: Sequence[Turn],
    sample_id: str = "?",
    *,
    prompt: bool = False,
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
) -> Rendered:
    """Render turns with the processor's template; `prompt` adds the text that precedes an answer.

    `tools` are those that the model may call, for templates that list them. `thinking` is the value of
    `enable_thinking` for templates that read it; None: the processor's own setting.

    A template may drop a reply's text up to its last `</think>`; the reply is then the text after that.

    Raises:
        BadSample: the template refuses the turns, or drops a reply.
    """
    texts = [(turn.role, part) for turn in turns for part in turn.content if isinstance(part, str)]
    learned = [turn for turn in turns for part in turn.content if isinstance(part, str)]
    if any(marker in part for _, part in texts for marker in MARKERS):
        raise BadSample(sample_id, "contains one of the Unicode noncharacters U+FDD0 to U+FDD2")
    text, spans = _render_with_markers(processor, turns, sample_id, prompt, tools, thinking)
    whitespace = {}
    if any(role == "assistant" and part != part.strip() for role, part in texts):
        without_blanks = [_strip_reply(turn) for turn in turns]
        stripped = _render_with_markers(processor, without_blanks, sample_id, prompt, tools, thinking)
        whitespace = _kept_whitespace((text, spans), stripped)
    replies, weights = [], []
    for number, (role, part) in enumerate(texts):
        if role == "assistant":
            if number not in spans:
                raise BadSample(sample_id, f"its template drops the reply {part[:60]!r}")
            own = len(part) - len(part.lstrip()), len(part) - len(part.rstrip())  # not that of the reply next to it
            before, after = map(min, own, whitespace.get(number, (0, 0)))
            if learned[number].supervised:
                replies.append((spans[number][0] - before, spans[number][1] + after))
                weights.append(learned[number].weight)
    is_weighted = any(weight != 1 for weight in weights)
    return Rendered(text, sorted(spans.values()), replies, tuple(weights) if is_weighted else ())


def _render_with_markers(
    processor: Processor,
    turns: Sequence[Turn],
    sample_id: str,
    prompt: bool,
    tools: Sequence[Tool],
    thinking: bool | None,
) -> MarkedText:
    """Render with markers around each text, and take them out."""
    return strip_markers(render_marked(processor, turns, sample_id, prompt=prompt, tools=tools, thinking=thinking))


def render_marked(
    processor: Processor,
    turns: Sequence[Turn],
    sample_id: str,
    *,
    prompt: bool = False,
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
) -> str:
    """Render with markers around each text; `thinking` as in `render`.

    Raises:
        BadSample: the template refuses the turns.
    """
    numbers, tokens = count(), (processor.image_token, processor.video_token)
    messages = []
    for turn in turns:
        parts = tuple(add_markers(p, next(numbers), tokens) if isinstance(p, str) else p for p in turn.content)
        messages.append(replace(turn, content=parts).as_message(*tokens))
    options = {"tools": list(tools)} if tools else {}
    with processor_errors("its template", sample_id):
        return processor.apply_chat_template(
            messages, add_generation_prompt=prompt, enable_thinking=thinking if prompt else False, **options
        )


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


def reply_ending(processor: Processor) -> str:
    """Return what the chat template writes after a reply, without blanks before it: a special token or white space.

    Raises:
        ValueError: neither follows, see `reply_end`, or the template refuses a question with its answer.
    """
    rendered = render(processor, [Turn("user", ("?",)), Turn("assistant", ("!",))])
    end = rendered.replies[-1][1]
    return rendered.text[end : reply_end(processor, rendered.text, end)].lstrip(" ")


Labeller = Callable[[Processor, Rendered, Sequence[int], Sequence[Span]], list[int]]
"""Makes labels, `(tokens,)`, of a rendered conversation, its ids and the span of characters that each id comes from."""


def label_replies(processor: Processor, rendered: Rendered, ids: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """Return labels: the id within replies and their ends, -100 elsewhere."""
    labels = [IGNORE_INDEX] * len(ids)
    for position, _ in _iter_reply_tokens(processor, rendered, spans):
        labels[position] = ids[position]
    return labels


def _iter_reply_tokens(processor: Processor, rendered: Rendered, spans: Sequence[Span]) -> Iterator[tuple[int, int]]:
    """Yield the place of each token of a reply or of its end, with the number of the reply."""
    text = rendered.text
    # A reply begins at the blank before it, without which prompts end (`ASSISTANT:`).
    supervised = [
        (start - text.endswith(" ", 0, start), reply_end(processor, text, end)) for start, end in rendered.replies
    ]
    remaining = enumerate([*supervised, (len(text) + 1,) * 2])
    number, (start, stop) = next(remaining)
    for position, (a, b) in enumerate(spans):
        while a >= stop:
            number, (start, stop) = next(remaining)
        if b > start and a < stop:
            yield position, number


def weigh_labels(
    processor: Processor, rendered: Rendered, spans: Sequence[Span], factors: LossWeights = ALL_ONE
) -> list[float] | None:
    """Return the weight of each token's loss, that of its reply times `factors`, 1 elsewhere; None if all are 1."""
    if not rendered.weights and factors.is_one:
        return None
    weights = [1.0] * len(spans)
    for number, tokens in groupby(_iter_reply_tokens(processor, rendered, spans), key=itemgetter(1)):
        positions = [position for position, _ in tokens]
        own = rendered.weights[number] if rendered.weights else 1.0
        reply = factors.factors(rendered.text, [spans[position] for position in positions])
        for position, factor in zip(positions, reply, strict=True):
            weights[position] = own * factor
    return weights


def encode(
    processor: Processor,
    sample: Sample,
    sizes: Sequence[MediaSize] = (),
    label: Labeller = label_replies,
    render: Callable[[Processor, Sequence[Turn], str], Rendered] = render,
    *,
    keep_thinking: bool = False,
    factors: LossWeights = ALL_ONE,
) -> Encoded:
    """Return ids and labels of a whole conversation. `render` renders it, and `label` makes the labels.

    A reply that is not `supervised` has no labels. Conversations with tools or thinking are rendered by `whole_turns`;
    with `keep_thinking`, a template that drops thinking of a trained reply is refused. `factors` multiply weights.

    `sizes` are those of its images and videos, if the processor needs them (`vision.images.media_sizes_from_opened`).

    Raises:
        BadSample: there is no reply, the template refuses the turns or drops one, or nothing would be supervised.
    """
    if problem := sample.reply_problem:
        raise BadSample(sample.id, problem)
    if processor.sees_media_together and sample.learns_between_media:
        raise BadSample(
            sample.id,
            "has a trained reply between images, but in this model earlier images attend to later ones: put all "
            'images before it, or set "loss": false on it',
        )
    if needs_whole_turns(sample.turns, sample.tools):
        rendered = render_whole_turns(processor, sample, keep=keep_thinking)
    else:
        rendered = render(processor, sample.turns, sample.id)
    ids, spans = tokenize(processor, rendered, sample, sizes)
    labels = label(processor, rendered, ids, spans)
    if labels.count(IGNORE_INDEX) == len(labels):
        raise BadSample(sample.id, "no supervised token")
    return Encoded(ids, labels, weigh_labels(processor, rendered, spans, factors))


def encode_prompt(
    processor: Processor,
    turns: Sequence[Turn],
    sizes: Sequence[MediaSize] = (),
    sample_id: str = "?",
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
) -> list[int]:
    """Return the ids of a conversation that waits for an answer.

    `tools` are those that the model may call; `thinking` says whether it should think before its answer, for templates
    that support it; None: the processor's own setting.
    """
    sample = Sample(sample_id, tuple(turns), tools=tuple(map(dict, tools)))
    if needs_whole_turns(turns, tools):
        rendered = render_whole_turns(processor, sample, prompt=True, thinking=thinking)
    else:
        rendered = render(processor, turns, sample_id, prompt=True, thinking=thinking)
    return tokenize(processor, rendered, sample, sizes)[0]


def tokenize(
    processor: Processor, rendered: Rendered, sample: Sample, sizes: Sequence[MediaSize] = ()
) -> tuple[list[int], list[Span]]:
    """Return the ids of a rendered sample, and the characters that each comes from; arguments as in `encode`.

    Raises:
        BadSample: the processor refuses the text, or the size of an image or video.
    """

    def tokenize_one(index: int) -> object:
        """Tokenize the placeholder of one medium, to find the medium that the processor refuses."""
        token = processor.video_token if isinstance(sizes[index], Clip) else processor.image_token
        return processor.tokenize(str(token), (), sizes[index : index + 1])

    if has_surrogate(rendered.text):
        raise BadSample(sample.id, f"what the chat template writes {HALF_PAIR}")
    with processor_errors("the processor", sample.id, sample.media, tokenize_one if sizes else None):
        return processor.tokenize(rendered.text, rendered.spoken, sizes)


SMALLER_IMAGES = "; dataset.max_image_tokens bounds the tokens of an image"
"""A hint for samples with images that are too long, if the tokens of images depend on their sizes."""


def limit_length(
    encoded: Encoded, longest: int, media: Sequence[int], sample_id: str, *, truncate: bool, hint: str = ""
) -> Encoded:
    """Return the sample if it has at most `longest` tokens; with `truncate`, its beginning.

    The beginning ends within a reply or with one: the start of an unanswered question is cut too, unless an image
    is in it. `media` are the ids of images and videos; `hint` says what may be done.

    Raises:
        OverLong: it is longer, or cutting it would cut an image or every reply.
    """
    length = len(encoded.input_ids)
    if length <= longest:
        return encoded
    if not truncate:
        limit = f"at most {longest} are allowed (dataset.max_length, or the language model's positions)"
        raise OverLong(sample_id, f"{length} tokens, {limit}{hint}")
    cut = Encoded(encoded.input_ids[:longest], encoded.labels[:longest], encoded.weights and encoded.weights[:longest])
    if not set(media).isdisjoint(encoded.input_ids[longest:]):
        raise OverLong(sample_id, f"{length} tokens: cutting it to {longest} would cut an image{hint}")
    if cut.labels.count(IGNORE_INDEX) == longest:
        raise OverLong(sample_id, f"{length} tokens: cutting it to {longest} would cut every reply")
    while cut.labels[-1] == IGNORE_INDEX and cut.input_ids[-1] not in media:
        cut.input_ids.pop()
        cut.labels.pop()
        if cut.weights is not None:
            cut.weights.pop()
    return cut
