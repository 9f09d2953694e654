"""Renders many conversations: a template that only copies texts runs twice for all conversations of a structure.

The structure of a conversation is its roles, its images, and the blanks around its texts. `labels.render` defines the
result, and renders every conversation with a text that the template might look at (`template_analysis`).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.data.encoding.labels import render, render_marked
from vlm.data.encoding.markers import CLOSE, MARKER_PATTERN, MARKERS, OPEN, THINKING_END, Rendered, Span
from vlm.data.encoding.template_analysis import copied_unless
from vlm.data.processor import Processor
from vlm.data.sample import ImageRef, Turn

MAX_STRUCTURES = 4096
"""The maximum number of structures whose rendering is kept."""

Structure = tuple[object, ...]
"""The template; of each turn, its role, whether it is trained on, its weight, and its parts: blanks around texts, None
for images."""


@dataclass(eq=False)
class Skeleton:
    """A rendered conversation without its texts.

    Attributes:
        literals: the text that the template writes before, between and after the texts.
        order: the numbers of the texts, as they follow one another; one may be left out.
        replies: of each reply that is trained on, the number of its text, and how many blanks before and after it has.
        weights: as in `Rendered`.
        is_confirmed: whether it gave the same result as a full rendering of a second conversation.
    """

    literals: list[str]
    order: list[int]
    replies: list[tuple[int, int, int]]
    weights: tuple[float, ...] = ()
    is_confirmed: bool = False

    def fill(self, texts: Sequence[str]) -> Rendered:
        """Return the conversation with these texts, without blanks at their ends."""
        pieces = [self.literals[0]]
        position = len(pieces[0])
        spans: dict[int, Span] = {}
        for number, literal in zip(self.order, self.literals[1:], strict=True):
            text = texts[number]
            end = position + len(text)
            spans[number] = position, end
            pieces += (text, literal)
            position = end + len(literal)
        replies = [(spans[number][0] - before, spans[number][1] + after) for number, before, after in self.replies]
        return Rendered("".join(pieces), list(spans.values()), replies, self.weights)


class Renderer:
    """Renders conversations with a processor's template, as `labels.render` does."""

    def __init__(self, processor: Processor):
        self.processor = processor
        self._skeletons: dict[Structure, Skeleton | None] = {}
        self._template: str | None = None
        self._excluded: tuple[str, ...] | None = None

    def __call__(self, processor: Processor, turns: Sequence[Turn], sample_id: str) -> Rendered:
        """Return rendered turns.

        Raises:
            BadSample: the template refuses the turns, or drops a reply.
        """
        if processor is not self.processor or (found := self._find_structure(turns)) is None:
            return render(processor, turns, sample_id)
        structure, texts = found
        skeleton = self._skeletons.get(structure)
        if skeleton is not None and skeleton.is_confirmed:
            return skeleton.fill(texts)
        rendered = render(processor, turns, sample_id)
        if structure not in self._skeletons:
            if len(self._skeletons) >= MAX_STRUCTURES:
                self._skeletons.clear()
            self._skeletons[structure] = make_skeleton(render_marked(processor, turns, sample_id), texts, rendered)
        elif skeleton is not None:
            skeleton.is_confirmed = skeleton.fill(texts) == rendered
            if not skeleton.is_confirmed:
                self._skeletons[structure] = None
        return rendered

    def find_skeleton(self, turns: Sequence[Turn]) -> tuple[Skeleton, list[str]] | None:
        """Return the skeleton of a conversation and its texts; None if it is not known to give the rendering."""
        if (found := self._find_structure(turns)) is None:
            return None
        structure, texts = found
        skeleton = self._skeletons.get(structure)
        return None if skeleton is None or not skeleton.is_confirmed else (skeleton, texts)

    def _find_structure(self, turns: Sequence[Turn]) -> tuple[Structure, list[str]] | None:
        """Return the structure of a conversation and its texts; None if the template might see the texts."""
        template = self.processor.chat_template
        if template is not self._template:
            self._template, self._excluded = template, _excluded_strings(self.processor)
        if (excluded := self._excluded) is None:
            return None
        texts: list[str] = []
        structure: list[object] = [template]
        for turn in turns:
            structure += (turn.role, turn.supervised, turn.weight)
            for part in turn.content:
                if isinstance(part, str):
                    text = part.strip()
                    if not text or not (text.isascii() or all(marker not in text for marker in MARKERS)):
                        return None
                    for string in excluded:
                        if string in text:
                            return None
                    start = 0 if len(text) == len(part) else part.index(text)
                    structure.append((part[:start], part[start + len(text) :]))
                    texts.append(text)
                elif isinstance(part, ImageRef):
                    structure.append(None)
                else:
                    return None
        return tuple(structure), texts


def _excluded_strings(processor: Processor) -> tuple[str, ...] | None:
    """Return the strings that texts must not contain for the template only to copy them; None if it does more."""
    from transformers import PreTrainedTokenizerBase

    template = processor.chat_template
    renders = type(processor.tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    if template is None or not renders or any(marker in template for marker in MARKERS):
        return None
    if (strings := copied_unless(template)) is None:
        return None
    tokens = (processor.image_token, processor.video_token)
    return tuple(sorted({THINKING_END, *strings, *(token for token in tokens if token)}))


def make_skeleton(marked: str, texts: Sequence[str], rendered: Rendered) -> Skeleton | None:
    """Return the skeleton of a rendering with markers; None unless each text occurs in it exactly once, unchanged.

    `rendered` is the same without markers.
    """
    literals, order = [], []
    seen: set[int] = set()
    position = 0
    matches = list(MARKER_PATTERN.finditer(marked))
    for opened, closed in zip(matches[::2], matches[1::2], strict=False):
        number = int(opened[2] or -1)
        is_pair = (opened[1], closed[1], closed[2]) == (OPEN, CLOSE, opened[2])
        if not is_pair or number in seen or marked[opened.end() : closed.start()] != texts[number]:
            return None
        literals.append(marked[position : opened.start()])
        order.append(number)
        seen.add(number)
        position = closed.end()
    skeleton = Skeleton([*literals, marked[position:]], order, [], rendered.weights)
    spans = skeleton.fill(texts).spoken
    for start, end in rendered.replies:
        place = bisect_left(spans, (start, 0))  # of the first text from there on
        if place == len(spans) or spans[place][1] > end:
            return None
        skeleton.replies.append((order[place], spans[place][0] - start, end - spans[place][1]))
    return skeleton if len(matches) % 2 == 0 and skeleton.fill(texts) == rendered else None
