"""Rendering many conversations gives the same, character for character, as rendering each by itself."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import CHAT_TEMPLATES, byte_tokenizer
from vlm.data.encoding.labels import encode, render
from vlm.data.encoding.markers import Rendered
from vlm.data.encoding.renderer import Renderer, make_skeleton
from vlm.data.encoding.sample_encoder import NO_LIMIT, SampleEncoder
from vlm.data.sample import BadSample, ContentPart, ImageRef, Sample, Turn
from vlm.models import VLMProcessor

IMAGE = ImageRef(Path("image.png"))
TEXTS = (
    "a cat", "two\nlines", "  blanks at the ends ", "\nwhat is it?", "yes", "naïve 猫が二匹 🐱", "it says <image>", " ",
    "", "<think>so</think> a cat", "</think>", "</s> and <|im_end|>", "{{ messages }}", "\u2028.\u00a0", "\ufdd0", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def image_processor(parts) -> Any:
    return parts.processor().image_processor


def make_processor(image_processor: Any, template: str) -> VLMProcessor:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return VLMProcessor(image_processor, tokenizer, chat_template=template, tokens_per_image=3)


def draw_turns(draw: random.Random) -> list[Turn]:
    turns = [Turn("system", (draw.choice(TEXTS),))] if draw.random() < 0.2 else []
    for number in range(draw.choice((1, 1, 1, 2, 3))):
        question: list[ContentPart] = [draw.choice(TEXTS)]
        if number == 0 and draw.random() < 0.5:
            question[draw.randint(0, 1) :] = [IMAGE, *question]
        turns += [Turn("user", tuple(question)), Turn("assistant", (draw.choice(TEXTS),), draw.random() < 0.9)]
    return turns


def outcome(make: Any, *arguments: object) -> object:
    """Return what a call returns, or the message of its error."""
    try:
        return make(*arguments)
    except BadSample as error:
        return str(error)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_renderings_ids_and_labels_are_those_of_each_conversation_by_itself(image_processor: Any, name: str):
    draw = random.Random(name)
    processor = make_processor(image_processor, CHAT_TEMPLATES[name].text)
    renderer, encoder = Renderer(processor), SampleEncoder(processor, NO_LIMIT, truncate=False)
    for number in range(400):
        turns = draw_turns(draw)
        assert outcome(renderer, processor, turns, "x") == outcome(render, processor, turns, "x"), turns
        if number % 8 == 0:
            sample = Sample("x", tuple(turns))
            assert outcome(encoder.encode, sample) == outcome(encode, processor, sample)
    assert any(skeleton is not None and skeleton.is_confirmed for skeleton in renderer._skeletons.values())


def count_renderings(monkeypatch: pytest.MonkeyPatch, processor: VLMProcessor, texts: Sequence[str]) -> int:
    """Return how often the template is run for questions with these texts."""
    real, calls = VLMProcessor.apply_chat_template, []

    def counted(self: VLMProcessor, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(VLMProcessor, "apply_chat_template", counted)
    renderer = Renderer(processor)
    for text in texts:
        renderer(processor, [Turn("user", (text,)), Turn("assistant", ("yes",))], "x")
    return len(calls)


def test_a_template_is_run_for_two_conversations_of_a_structure(image_processor: Any, monkeypatch: pytest.MonkeyPatch):
    processor = make_processor(image_processor, CHAT_TEMPLATES["chatml"].text)
    assert count_renderings(monkeypatch, processor, [f"question {number}" for number in range(20)]) == 3


def test_a_template_that_sees_texts_is_run_for_each(image_processor: Any, monkeypatch: pytest.MonkeyPatch):
    template = "{% for m in messages %}{{ m.content | length }}: {{ m.content }}<|im_end|>{% endfor %}"
    assert count_renderings(monkeypatch, make_processor(image_processor, template), ["a", "bb", "c"]) == 3


def test_another_template_of_the_processor_is_used_at_once(image_processor: Any):
    processor = make_processor(image_processor, CHAT_TEMPLATES["chatml"].text)
    renderer, turns = Renderer(processor), [Turn("user", ("a",)), Turn("assistant", ("b",))]
    for _ in range(3):
        renderer(processor, turns, "x")
    processor.chat_template = CHAT_TEMPLATES["phi"].text
    assert renderer(processor, turns, "x") == render(processor, turns, "x")


def test_a_text_that_stands_twice_or_changed_has_no_skeleton():
    once = "\ufdd00\ufdd1a\ufdd20\ufdd1"
    rendered = Rendered("a.", [(0, 1)], [])
    assert make_skeleton(f"{once}.", ["a"], rendered) is not None
    assert make_skeleton(f"{once}.", ["A"], rendered) is None
    assert make_skeleton(f"{once}{once}", ["a"], Rendered("aa", [(0, 2)], [])) is None
    assert make_skeleton("\ufdd00\ufdd1a.", ["a"], rendered) is None
