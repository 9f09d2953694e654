"""What a family is tried on, and what its own processor makes of it."""

import pytest

from tests.assembly.family_trial.subjects import make_subject
from vlm.assembly.family_trial.conversations import (
    Builder,
    describe,
    draw_image,
    draw_video,
    make_row,
    one_turn,
    read_natively,
    takes_lists_of_parts,
    two_turns,
)
from vlm.assembly.family_trial.verdicts import NotProvableError


def test_images_differ_by_their_seed_and_are_made_once():
    assert draw_image(1).tobytes() != draw_image(2).tobytes()
    assert draw_image(1) is draw_image(1)
    assert draw_image(1, (64, 32)).size == (32, 64)


def test_conversations_are_told_in_words():
    processor = make_subject("qwen2-vl").processor
    conversation = Builder().system("Be brief.").ask("what?", draw_image(1), draw_video(1, processor)).done()
    assert describe(conversation) == "a conversation of 1 question(s), a system turn, 1 image(s), 1 video(s)"
    assert describe(two_turns([])) == "a conversation of 2 question(s)"


@pytest.mark.parametrize(("name", "takes_lists"), [("qwen2-vl", True), ("phi4-multimodal", False), ("paligemma", True)])
def test_ids_of_the_familys_own_processor(name: str, takes_lists: bool):
    processor = make_subject(name).processor
    assert takes_lists_of_parts(processor) == takes_lists
    conversation = one_turn(draw_image(1))
    row = make_row(processor, conversation)
    assert read_natively(processor, conversation)["input_ids"][0].tolist() == row["input_ids"]
    prompt = Builder().ask("Which animal is it?", draw_image(1)).done()
    ids = read_natively(processor, prompt, prompt=True)["input_ids"][0].tolist()
    assert ids == row["input_ids"][: len(ids)]


def test_another_template_gets_texts():
    processor = make_subject().processor
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    assert not takes_lists_of_parts(processor)
    ids = read_natively(processor, one_turn(draw_image(1)))["input_ids"][0].tolist()
    assert processor.tokenizer.decode(ids).startswith("user: <image><image>")


def test_what_is_refused_cannot_be_proved():
    with pytest.raises(NotProvableError, match=r"refuses a conversation of 2 question\(s\), 1 image\(s\)"):
        read_natively(make_subject("paligemma").processor, two_turns([draw_image(1)]))
    processor = make_subject().processor
    processor.chat_template = "{{ raise_exception('nobody may speak') }}"
    with pytest.raises(NotProvableError, match="nobody may speak"):
        read_natively(processor, one_turn(draw_image(1)))
