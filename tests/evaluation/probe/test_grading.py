"""Answers to the probe: what people would call right is right, and what they would not is not."""

import pytest

from vlm.evaluation.probe.grading import RULES, Check, grade

COLOUR = Check("choice", "red", ("red", "blue", "orange"))
THREE = Check("number", "3")


@pytest.mark.parametrize(
    ("answer", "check", "is_right"),
    [
        ("Red.", COLOUR, True),
        ("The circle is red", COLOUR, True),
        ("red or blue", COLOUR, False),
        ("It is colored", COLOUR, False),
        ("<think>blue?</think> red", COLOUR, True),
        ("No, there is none.", Check("choice", "no", ("yes", "no")), True),
        ("The word is LAMP!", Check("word", "LAMP"), True),
        ("lamp", Check("word", "LAMP"), True),
        ("LAMPS", Check("word", "LAMP"), False),
        ("There are three circles, not 4.", THREE, True),
        ("3", THREE, True),
        ("13", THREE, False),
        ("many", THREE, False),
        ('["a", "b"]', Check("json_list", "2"), True),
        ('```json\n["a", "b"]\n```', Check("json_list", "2"), True),
        ("[1, 2]", Check("json_list", "2"), False),
        ('Here: ["a", "b"]', Check("json_list", "2"), False),
        ('{"colour": "red"}', Check("json_object", "colour"), True),
        ('{"colour": "red", "more": 1}', Check("json_object", "colour"), False),
        ("A red circle.", Check("num_words", "3"), True),
        ("A big red circle", Check("num_words", "3"), False),
        ("CIRCLE", Check("upper_case", ""), True),
        ("123", Check("upper_case", ""), False),
        ("A circle. DONE.", Check("ends_with", "DONE"), True),
        ("DONE", Check("ends_with", "DONE"), False),
        ("red, green, blue.", Check("comma_list", "3"), True),
        ("The colours are red, green, and also blue", Check("comma_list", "3"), False),
    ],
)  # fmt: skip
def test_answers_are_graded_as_people_would(answer: str, check: Check, is_right: bool):
    assert grade(answer, check) == is_right


def test_a_check_survives_its_record():
    assert Check.from_record(COLOUR.as_record()) == COLOUR
    with pytest.raises(ValueError, match="a rule \\(choice, word, number"):
        Check.from_record({"rule": "nothing", "right": "a", "choices": []})


def test_every_rule_refuses_an_empty_answer():
    for rule in RULES:
        assert grade("", Check(rule, "2", ("2",))) == 0
