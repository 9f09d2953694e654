"""Thinking: found, left out, and put where a template reads it."""

import pytest

from vlm.data.encoding.thinking import (
    drop_thinking,
    find_thinking,
    has_thinking,
    is_thinking_asked,
    place_thinking,
    without_thinking,
)
from vlm.data.sample import Sample, Turn

ASKED = Turn("user", ("1 + 1?",))


def reply(*content: str, thinking: str | None = None) -> Turn:
    return Turn("assistant", content, thinking=thinking)


FOUND = {
    "apart": (reply("2", thinking="Hm."), "Hm."),
    "before the text": (reply("<think>\nHm.\n</think>\n\n2"), "Hm."),
    "behind blanks": (reply(" \n<think>Hm.</think>2"), "Hm."),
    "empty": (reply("<think>\n\n</think>\n\n2"), ""),
    "without an end": (reply("<think>Hm."), ""),
    "within the text": (reply("a <think>Hm.</think>"), ""),
    "of the user": (Turn("user", ("<think>Hm.</think>",)), ""),
}


@pytest.mark.parametrize("name", FOUND)
def test_thinking_is_found(name: str):
    turn, thinking = FOUND[name]
    assert find_thinking(turn) == thinking
    assert has_thinking(turn) == (bool(thinking) or name == "empty")


def test_thinking_is_dropped():
    turns = (ASKED, reply("<think>\nHm.\n</think>\n\n2", thinking=None), ASKED, reply("3", thinking="Oh."))
    assert drop_thinking(Sample("x", turns)).turns == (ASKED, reply("2"), ASKED, reply("3"))
    plain = Sample("x", (ASKED, reply("2")))
    assert drop_thinking(plain) is plain
    (_, blank) = drop_thinking(Sample("x", (ASKED, reply("", thinking="Hm.")))).turns
    assert not blank.supervised, "a reply that was only thinking is blank without it"


def test_only_the_replies_behind_the_last_question_ask_for_thinking():
    assert is_thinking_asked((ASKED, reply("2", thinking="Hm.")))
    assert not is_thinking_asked((ASKED, reply("2", thinking="Hm."), ASKED, reply("3")))
    assert not is_thinking_asked((ASKED, reply("<think></think>2")))


def test_thinking_is_put_where_a_template_reads_it():
    apart, inline = reply("2", thinking="Hm."), reply("<think>\nHm.\n</think>\n\n2")
    for turn in (apart, inline):
        assert place_thinking([turn], "{{ message.reasoning_content }}") == [apart]
        assert place_thinking([turn], "{{ message.content }}") == [inline]
    assert place_thinking([reply("2", thinking="")], "") == [reply("2")]


@pytest.mark.parametrize(
    ("answer", "rest"),
    [("<think>a</think>\n\n2", "2"), ("a</think>2", "2"), ("2", "2"), ("<think>a, b, c", ""), ("", "")],
)
def test_an_answer_is_measured_without_its_thinking(answer: str, rest: str):
    assert without_thinking(answer) == rest
