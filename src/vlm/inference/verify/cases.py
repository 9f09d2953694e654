"""The questions that are asked of both engines: those that are made here, and those of the user's records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import takewhile
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.encoding.prompts import prompt_turns
from vlm.data.sample import BadSample, ContentPart, ImageRef, Sample, Turn
from vlm.data.sources import Source

Message = dict[str, Any]
"""A message as transformers' processors and OpenAI's interface take it: a role, and a list of images and texts."""

SIZES = ((64, 48), (48, 64), (160, 40), (40, 160), (224, 224), (9, 9), (97, 61), (336, 336), (500, 333))
"""Widths and heights of the images that are made: every way in which an image is padded, cut, shrunk and enlarged."""

QUESTIONS = (
    "What is this?", "Describe the image.", "How many colours are there?", "Is it dark?", "Which shape is it?",
    "What's on the left?", "Name 3 things you see.", 'Read the text: "12.5 %"', "Was ist das?", "Qu'est-ce que c'est ?",
    "这是什么？", "これは何ですか？", "What colour is the top?\nAnswer with a single word.", "a) red b) blue?", "🙂?",
    "Write  two  blanks.", "x = [1, 2]; print(x)", "Is there a cat? yes/no", "Explain in one sentence.",
)  # fmt: skip
"""Short texts with what tokenizers treat differently: digits, quotes, line breaks, blanks, other scripts."""


@dataclass(frozen=True)
class Case:
    """A conversation that waits for a reply; its images are files in memory, as a client would send them.

    Attributes:
        name: letters, digits and hyphens; the only one of a request.
        turns: the conversation as training reads it. Images have `content`.
        writes_line_breaks: whether a client writes the line break that training's records have between the leading
            images of a turn and its text: composed models' templates write it, those of families do not.
    """

    name: str
    turns: tuple[Turn, ...]
    writes_line_breaks: bool = False

    @property
    def images(self) -> list[bytes]:
        """The image files, in the order of the text."""
        refs = [part for turn in self.turns for part in turn.content if isinstance(part, ImageRef)]
        return [ref.content for ref in refs if ref.content is not None]

    @property
    def messages(self) -> list[Message]:
        """The conversation as a plain client writes it: `{"type": "image"}` and `{"type": "text", "text": …}`.

        Images of all messages together are `images`, in order.
        """
        return [
            {"role": turn.role, "content": list(_content(turn, keeps_break=self.writes_line_breaks))}
            for turn in self.turns
        ]


def _content(turn: Turn, *, keeps_break: bool) -> Iterator[Message]:
    leading = 0
    if not keeps_break:
        leading = len(list(takewhile(lambda part: isinstance(part, ImageRef), turn.content)))
    for place, part in enumerate(turn.content):
        if isinstance(part, str):
            yield {"type": "text", "text": part.removeprefix("\n") if leading and place == leading else part}
        else:
            yield {"type": "image"}


def make_cases(number: int, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Case]:
    """Return so many questions, the same at every call, about images of these widths and heights.

    Of ten, six have one image, two have several, one has none, and one is the second question of a conversation.
    """
    return [_make_case(index, sizes) for index in range(number)]


def _make_case(index: int, sizes: Sequence[tuple[int, int]]) -> Case:
    kind, text = index % 10, QUESTIONS[index % len(QUESTIONS)]
    num_images = {3: 0, 6: 2, 9: 3}.get(kind, 1)
    images = [ImageRef(content=draw_image(index, place, sizes)) for place in range(num_images)]
    content: tuple[ContentPart, ...] = (*images, f"\n{text}") if images else (text,)
    turns = (Turn("user", content),)
    if kind == 7:
        turns = (*turns, Turn("assistant", ("A red one.",)), Turn("user", ("And what else?",)))
    return Case(f"made-{index:03}", turns)


def draw_image(index: int, place: int, sizes: Sequence[tuple[int, int]] = SIZES) -> bytes:
    """Return a PNG file of a gradient, a disc and some noise, another one for each question and place in it.

    One of ten has a single channel.
    """
    width, height = sizes[(index + 4 * place) % len(sizes)]
    generator = np.random.default_rng([index, place])
    columns, rows = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    ends = generator.integers(0, 256, (2, 3))
    pixels = ends[0] + (ends[1] - ends[0]) * ((columns + rows) / 2)[..., None]
    centre = generator.uniform(0.2, 0.8, 2)
    pixels[np.hypot(columns - centre[0], rows - centre[1]) < 0.25] = generator.integers(0, 256, 3)
    pixels += generator.normal(0, 12, pixels.shape)
    file = BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    (image.convert("L") if index % 10 == 5 else image).save(file, "PNG")
    return file.getvalue()


def read_cases(source: Source, number: int) -> tuple[list[Case], list[str]]:
    """Return the first questions of a file of records, and why records before them were left out.

    A question is a record up to its last reply, as in training. Videos are left out: engines sample frames in ways of
    their own.
    """
    cases: list[Case] = []
    left_out: list[str] = []
    for index in range(len(source)):
        if len(cases) == number:
            break
        try:
            sample = source.sample(index)
            cases.append(Case(f"data-{index:05}", tuple(_with_contents(sample))))
        except BadSample as error:
            left_out.append(str(error))
    return cases, left_out


def _with_contents(sample: Sample) -> Iterator[Turn]:
    """Yield the turns of a prompt with its image files in memory.

    Raises:
        BadSample: there is no prompt, it has a video, or a file cannot be read.
    """
    turns: Sequence[Turn] = prompt_turns(sample)
    if not turns:
        raise BadSample(sample.id, "there is nothing before its reply")
    for turn in turns:
        yield replace(turn, content=tuple(_with_content(part, sample.id) for part in turn.content))


def _with_content(part: ContentPart, sample_id: str) -> ContentPart:
    if isinstance(part, str) or (isinstance(part, ImageRef) and part.content is not None):
        return part
    if not isinstance(part, ImageRef) or part.frame is not None or part.path is None:
        raise BadSample(sample_id, "videos are not compared")
    try:
        return ImageRef(part.path, part.path.read_bytes())
    except OSError as error:
        raise BadSample(sample_id, f"image {part.path} cannot be read: {error.strerror}", str(part.path)) from error
