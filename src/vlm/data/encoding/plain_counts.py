"""Counts of conversations from the words of their texts: how many tokens there are, and how many are supervised.

They equal those of `SampleEncoder.encode`, without ids and labels. A conversation whose template does more than copy
its texts, or in which a token may depend on more than the words of a text, is left to `encode`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from vlm.data.encoding.renderer import MAX_STRUCTURES, Skeleton
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.encoding.whole_turns import needs_whole_turns
from vlm.data.encoding.word_counts import WordCounts, make_word_counts
from vlm.data.processor import Processor
from vlm.data.sample import MediaSize, Sample


class TokenCounts(NamedTuple):
    """Numbers of tokens of a sample: `needed` is the fewest that it may be cut to, see `SampleEncoder.min_length`."""

    length: int
    needed: int
    supervised: int


Part = str | int
"""A piece of what a template writes itself, or the number of a text of the conversation."""


@dataclass(frozen=True)
class Stretch:
    """What stands between two special tokens.

    Attributes:
        prompt: what is not supervised.
        reply: what is: a reply with blanks around it; empty where there is none. The special token behind it is, too.
    """

    prompt: tuple[Part, ...]
    reply: tuple[Part, ...]


@dataclass(frozen=True)
class ImagePlace:
    """The place of an image."""


Outline = list[int | ImagePlace | Stretch]
"""A conversation in order; a number is one of tokens that are the same in all conversations of a structure."""


class PlainCounter:
    """Counts the tokens of conversations whose template only copies their texts.

    Args:
        encoder: what is counted is what it encodes.
        words: counts the tokens of words.
    """

    def __init__(self, encoder: SampleEncoder, words: WordCounts):
        self.encoder, self.words, self.processor = encoder, words, encoder.processor
        image = self.processor.image_token_ids()
        self._image_length = len(image)
        self._behind_image = image[::-1].index(self.processor.image_token_id)  # the token that ends it
        self._outlines: dict[Skeleton, Outline | None] = {}

    def count(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> TokenCounts | None:
        """Return the counts of a sample; `sizes` of its images, where the processor needs them.

        None: its structure is new or has no outline, it has tools or thinking, a text may hold an added token, or
        a word reaches from a prompt into a reply.
        """
        if sample.rejected is not None or needs_whole_turns(sample.turns, sample.tools):
            return None
        if (found := self.encoder.renderer.find_skeleton(sample.turns)) is None:
            return None
        skeleton, texts = found
        for text in texts:
            if not self.words.is_plain(text):
                return None
        if skeleton not in self._outlines:
            if len(self._outlines) >= MAX_STRUCTURES:
                self._outlines.clear()
            self._outlines[skeleton] = make_outline(self.processor, self.words, skeleton)
        if (outline := self._outlines[skeleton]) is None:
            return None
        images = self._image_lengths(outline, sizes)
        return None if images is None else self._count_outline(outline, texts, images)

    def _image_lengths(self, outline: Outline, sizes: Sequence[MediaSize]) -> list[int] | None:
        """Return the number of tokens of each image; None if they depend on sizes, and these are not as many."""
        number = sum(isinstance(step, ImagePlace) for step in outline)
        if not number or not self.processor.needs_image_sizes:
            return [self._image_length] * number
        if number != len(sizes):
            return None
        _, spans = self.processor.tokenize(self.processor.image_token * number, (), sizes)
        return [len(list(group)) for _, group in groupby(spans)]

    def _count_outline(self, outline: Outline, texts: list[str], images: list[int]) -> TokenCounts | None:
        """Return the counts of a conversation; `images` has the number of tokens of each."""
        length = supervised = behind_media = num_images = 0
        first: int | None = None
        for step in outline:
            if isinstance(step, int):
                length += step
            elif isinstance(step, ImagePlace):
                length += images[num_images]
                behind_media = length - self._behind_image
                num_images += 1
            elif (counts := self._count_stretch(step, texts)) is None:
                return None
            else:
                prompt, reply = counts
                if reply and first is None:
                    first = length + prompt
                supervised += reply
                length += prompt + reply
        return None if first is None else TokenCounts(length, max(first + 1, behind_media), supervised)

    def _count_stretch(self, stretch: Stretch, texts: list[str]) -> tuple[int, int] | None:
        """Return the tokens of a prompt, and of its reply and its end; None if a token may be of both."""
        prompt = _join(stretch.prompt, texts)
        if not stretch.reply:
            return self.words.count_text(prompt), 0
        counts = self.words.count_parts(prompt + _join(stretch.reply, texts), len(prompt))
        return None if counts is None else (counts[0], counts[1] + 1)


def _join(parts: Sequence[Part], texts: Sequence[str]) -> str:
    return "".join([part if isinstance(part, str) else texts[part] for part in parts])


def make_plain_counter(encoder: SampleEncoder) -> PlainCounter | None:
    """Return what counts the samples of an encoder; None if another class or tokenizer decides about tokens."""
    from vlm.models import VLMProcessor  # imports torch

    kind = type(encoder)
    encodes = kind.encode is SampleEncoder.encode and kind.min_length is SampleEncoder.min_length
    if not encodes or encoder.supervise != "replies":
        return None
    is_own = getattr(type(encoder.processor), "tokenize", None) is VLMProcessor.tokenize
    words = make_word_counts(encoder.processor.tokenizer) if is_own else None
    return None if words is None else PlainCounter(encoder, words)


def make_outline(processor: Processor, words: WordCounts, skeleton: Skeleton) -> Outline | None:
    """Return the outline of a skeleton; None if a reply does not end with a special token, or a token is uncertain.

    A token is uncertain where what the template writes may be the beginning of an added token.
    """
    outline: Outline = []
    blanks_before = {number: before for number, before, _ in skeleton.replies}
    parts: list[Part] = []
    for place, literal in enumerate(skeleton.literals):
        position = 0
        for match in words.added.finditer(literal):
            parts.append(literal[position : match.start()])
            position = match.end()
            if (stretch := _make_stretch(parts, blanks_before, words)) is None:
                return None
            is_image = match[0] == processor.image_token
            if stretch.reply and (is_image or not processor.special_tokens.fullmatch(match[0])):
                return None
            _add(outline, stretch, words)
            outline.append(ImagePlace() if is_image else 1 - bool(stretch.reply))
            parts = []
        parts.append(literal[position:])
        if place < len(skeleton.order):
            parts.append(skeleton.order[place])
    if (last := _make_stretch(parts, blanks_before, words)) is None or last.reply:
        return None
    _add(outline, last, words)
    return outline


def _add(outline: Outline, stretch: Stretch, words: WordCounts) -> None:
    is_constant = not stretch.reply and all(isinstance(part, str) for part in stretch.prompt)
    outline.append(words.count(words.split(_join(stretch.prompt, ()))) if is_constant else stretch)


def _make_stretch(parts: Sequence[Part], blanks_before: Mapping[int, int], words: WordCounts) -> Stretch | None:
    """Return the stretch of some parts; None if more than blanks follow a reply, or an added token may begin.

    `blanks_before` holds the number of each text that is a learned reply, and how many blanks before it belong to it.
    """
    if any(not part.isascii() or words.may_begin_token(part) for part in parts if isinstance(part, str)):
        return None
    place = next((place for place, part in enumerate(parts) if isinstance(part, int) and part in blanks_before), None)
    prompt, reply = list(parts), []
    if place is not None:
        if any(isinstance(part, int) or part.strip() for part in parts[place + 1 :]):
            return None
        prompt, reply = list(parts[:place]), list(parts[place:])
        literal, number = prompt.pop(), parts[place]
        if isinstance(literal, int) or isinstance(number, str):  # two texts with nothing in between
            return None
        start = len(literal) - blanks_before[number]
        if start < 0:
            return None
        start -= literal.endswith(" ", 0, start)  # a reply begins at the blank before it, see `labels`
        prompt.append(literal[:start])
        reply.insert(0, literal[start:])
    return Stretch(tuple(prompt), tuple(reply))
