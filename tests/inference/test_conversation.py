"""Conversations: what the model reads of what was said, and that nothing half said is kept."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.data.vision.test_video import write_video
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import CHAT_TEMPLATES, Parts, byte_tokenizer, picture
from vlm.config.schema import InferenceConfig
from vlm.data.coordinates.drawing import ANSWER_COLOUR
from vlm.data.sample import Turn
from vlm.inference.conversation import Conversation
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn
from vlm.models import VLMProcessor

GREEDY = InferenceConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def ours(parts: Parts) -> VisionLanguageModel:
    return make_random_model(parts, "llama")


def say(talk: Conversation, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> str:
    """The whole answer."""
    return "".join(talk.ask(text, images, videos)).strip()


# What the model reads


def test_each_question_comes_with_all_that_was_said(ours: VisionLanguageModel, tmp_path: Path):
    """Pictures may come in mid-conversation; the answers are those to the same turns at once."""
    picture(1).save(tmp_path / "a.png")
    talk = Conversation(ours, GREEDY)
    first = say(talk, "what?", [picture(0)])
    second = say(talk, "and then?")
    third = say(talk, "this <image> or that <image>?", [tmp_path / "a.png", picture(2)])
    turns = [user_turn("what?", 1), Turn("assistant", (first,)), user_turn("and then?", 0)]
    assert second == ours.answer([turns], [[picture(0)]], GREEDY)[0]
    turns += [Turn("assistant", (second,)), user_turn("this <image> or that <image>?", 2)]
    assert third == ours.answer([turns], [[picture(0), picture(1), picture(2)]], GREEDY)[0]
    assert talk.turns == (*turns, Turn("assistant", (third,)))
    assert [one.size for one in talk.media] == [(40, 30)] * 3
    assert [one.answer for one in talk.exchanges] == [first, second, third]


def test_a_system_prompt_stands_first(ours: VisionLanguageModel):
    talk = Conversation(ours, GREEDY, system_prompt="Be brief.")
    answer = say(talk, "what?", [picture(0)])
    assert answer == ours.answer([[Turn("system", ("Be brief.",)), user_turn("what?", 1)]], [[picture(0)]], GREEDY)[0]
    talk.reset()
    assert talk.turns == (Turn("system", ("Be brief.",)),)


def test_videos_are_asked_about(ours: VisionLanguageModel, tmp_path: Path):
    video = write_video(tmp_path / "a.mp4", 20)
    talk = Conversation(ours, GREEDY, max_frames=2)
    assert say(talk, "what?", videos=[video]) == ours.generate("what?", videos=[video], max_frames=2, max_new_tokens=8)
    assert len(talk.media) == 2


def test_beams_answer_in_one_piece(ours: VisionLanguageModel):
    beams = InferenceConfig(num_beams=2, max_new_tokens=6)
    talk = Conversation(ours, beams)
    assert list(talk.ask("what?", [picture(0)])) == ours.answer([[user_turn("what?", 1)]], [[picture(0)]], beams)
    assert len(talk.exchanges) == 1


def test_settings_may_change_between_questions(ours: VisionLanguageModel):
    talk = Conversation(ours)
    assert talk.settings == InferenceConfig()
    talk.settings = InferenceConfig(max_new_tokens=1)
    say(talk, "what?", [picture(0)])
    talk.settings = InferenceConfig(temperature=5.0, max_new_tokens=8)
    drawn = set()
    for seed in range(4):
        torch.manual_seed(seed)
        drawn.add(say(talk, "what?"))
        talk.undo()
    assert len(drawn) > 1


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_template_holds_a_conversation(parts: Parts, name: str):
    """A system turn stands once, at the beginning; templates that refuse one say so before anything is asked."""
    template, ours = CHAT_TEMPLATES[name], with_template(parts, name)
    short = InferenceConfig(max_new_tokens=2)
    talk = Conversation(ours, short, system_prompt="Be brief." if template.system else None)
    for number in range(3):
        say(talk, f"question {number}", [picture(number)])
    assert len(talk.exchanges) == 3
    if not template.system:
        talk = Conversation(ours, short, system_prompt="Be brief.")
        with pytest.raises(ValueError, match=r"its template refuses it: System role not supported"):
            talk.ask("what?")


def test_thinking_that_a_template_drops_does_no_harm(parts: Parts):
    ours = with_template(parts, "own-qwen3")
    talk = Conversation(ours, GREEDY)
    say(talk, "what?", [picture(0)])
    talk.exchanges = (replace(talk.exchanges[0], answer="<think>\nhm\n</think>\n\na cat"),)
    say(talk, "sure?")
    assert len(talk.exchanges) == 2


def with_template(parts: Parts, name: str) -> VisionLanguageModel:
    template = CHAT_TEMPLATES[name]
    model, processor = parts.model()
    tokenizer = byte_tokenizer(template.text, bos=template.bos, eos="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    other = VLMProcessor(processor.image_processor, tokenizer, chat_template=template.text, tokens_per_image=9)
    return VisionLanguageModel(model.eval(), other)


# What is kept


def test_an_answer_that_is_left_is_forgotten_and_stops(ours: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
    """With its question; the model does not go on by itself."""
    endless = {**ours.generation_options(InferenceConfig(2.0, max_new_tokens=400)), "eos_token_id": -1}
    talk = Conversation(ours, GREEDY)
    steps: list[int] = []
    leaving = threading.Event()

    def step(*_: Any) -> None:
        steps.append(1)
        time.sleep(0.1 if leaving.is_set() else 0.005)

    with monkeypatch.context() as patch:
        patch.setattr(ours, "generation_options", lambda _: endless)
        handle = ours.model.language_model.register_forward_hook(step)
        pieces = talk.ask("what?", [picture(0)])
        next(pieces)
        leaving.set()  # from here on, all steps would take longer than any wait for the processor
        pieces.close()
        handle.remove()
    assert talk.exchanges == ()
    assert len(steps) < 400
    assert say(talk, "what?", [picture(0)]) == ours.answer([[user_turn("what?", 1)]], [[picture(0)]], GREEDY)[0]


def test_an_answer_that_nobody_begins_to_take_is_not_kept(ours: VisionLanguageModel):
    talk = Conversation(ours, GREEDY)
    talk.ask("what?", [picture(0)])
    assert talk.exchanges == ()


def test_an_answer_that_fails_is_forgotten(ours: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
    talk = Conversation(ours, GREEDY)
    first = say(talk, "what?", [picture(0)])

    def fail(**_: Any) -> None:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(ours.model, "generate", fail)
        with pytest.raises(RuntimeError, match="out of order"):
            say(talk, "and then?", [picture(1)])
    assert [one.answer for one in talk.exchanges] == [first]
    assert len(talk.media) == 1


@pytest.mark.parametrize("change", ["reset", "undo", "ask"])
def test_an_answer_to_what_has_changed_meanwhile_is_not_kept(ours: VisionLanguageModel, change: str):
    """A page may clear a conversation while an answer comes."""
    talk = Conversation(ours, GREEDY)
    say(talk, "what?", [picture(0)])
    pieces = talk.ask("and then?")
    say(talk, "really?") if change == "ask" else getattr(talk, change)()
    kept = talk.exchanges
    list(pieces)
    assert talk.exchanges is kept


def test_undo_and_reset(ours: VisionLanguageModel):
    talk = Conversation(ours, GREEDY)
    talk.undo()
    first = say(talk, "what?", [picture(0)])
    say(talk, "and this?", [picture(1)])
    talk.undo()
    assert [one.answer for one in talk.exchanges] == [first]
    assert len(talk.media) == 1
    talk.reset()
    assert (talk.exchanges, talk.turns, talk.media) == ((), (), [])
    assert say(talk, "what?", [picture(0)]) == first


# Errors


@pytest.mark.parametrize(
    ("text", "images", "said"),
    [
        ("", [], "there is no question"),
        ("  ", [], "there is no question"),
        ("<image><image>", [picture()], "the prompt has 2 <image>, but 1 images were given"),
        ("what?", ["missing.png"], "missing.png does not open"),
        ("what \ufdd0?", [], "Unicode noncharacters"),
        (
            "word " * 600,
            [],
            r"the conversation has [\d,]+ tokens and its answer may have 8 \(max_new_tokens\), but the",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(
    ours: VisionLanguageModel, text: str, images: list[Image.Image | str], said: str
):
    talk = Conversation(ours, GREEDY)
    first = say(talk, "what?", [picture(0)])
    with pytest.raises(ValueError, match=said) as raised:
        talk.ask(text, images)
    assert "record '" not in str(raised.value)
    assert [one.answer for one in talk.exchanges] == [first]


def test_a_conversation_that_grows_too_long_is_refused(ours: VisionLanguageModel):
    """Where the question alone would not be; what was said before can still be gone back to."""
    talk = Conversation(ours, GREEDY)
    long = "word " * 40
    say(talk, long)
    with pytest.raises(ValueError, match=r"but the model reads at most 512"):
        [say(talk, long) for _ in range(9)]
    assert 1 < len(talk.exchanges) < 9
    talk.reset()
    say(talk, long)


def test_the_places_that_an_answer_tells_are_drawn(ours: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
    """Onto the newest image, in its pixels."""
    monkeypatch.setattr(ours, "stream_batch", lambda inputs, settings: iter(["cat: [0.10, 0.25, 0.50, ", "0.75]"]))
    talk = Conversation(ours, GREEDY)
    assert talk.draw_last_answer() is None
    say(talk, "where?")
    assert talk.draw_last_answer() is None, "no image was shown"
    say(talk, "where?", [Image.new("RGB", (400, 400))])
    say(talk, "and here?", [Image.new("RGB", (800, 400))])
    drawn = talk.draw_last_answer()
    assert drawn is not None
    assert drawn.size == (768, 384)
    crop = round((0.1 * 400 + 200) * 768 / 800)  # the model sees the middle of it
    assert drawn.getpixel((crop, 192)) == ANSWER_COLOUR
    monkeypatch.setattr(ours, "stream_batch", lambda inputs, settings: iter(["no"]))
    say(talk, "sure?")
    assert talk.draw_last_answer() is None
