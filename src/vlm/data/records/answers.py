"""Answers of questions, and the choices that some of them have, as records give them."""

import string

from vlm.data.records.text import text_from_value
from vlm.data.sample import BadSample, Record


def read_answers(value: object, sample_id: str) -> list[str]:
    """Read one answer or several, as strings or in VQA's form (`{"answer": "a cat"}`).

    Raises:
        BadSample: an answer is not a text, or there are none.
    """
    items = value if isinstance(value, list) else [value]
    answers = [item.get("answer") if isinstance(item, dict) else item for item in items]
    texts = [text for answer in answers if (text := text_from_value(answer)) is not None]
    if not texts or len(texts) < len(answers):
        raise BadSample(sample_id, f"`answer` must be a string or a list of strings, got {value!r:.60}")
    return texts


def read_references(record: Record, sample_id: str) -> tuple[str, ...]:
    """Read the reference answers of a record: its `references` or `answers`, or its `answer` if that is a list."""
    answer = record.get("answer")
    given = [record.get("references"), record.get("answers"), answer if isinstance(answer, list) else None]
    value = next((value for value in given if value is not None), None)
    return () if value is None else tuple(read_answers(value, sample_id))


def read_choices(choices: object, answer: object, sample_id: str) -> list[str]:
    """Read choices as texts. A number as the answer must not be both one choice and the index of another.

    Raises:
        BadSample: a choice is not a text, there are no choices, or the answer could mean two of them.
    """
    texts = [text_from_value(choice) for choice in choices] if isinstance(choices, list) else []
    if not texts or None in texts:
        raise BadSample(sample_id, "`choices` must be a list of strings")
    known = [text for text in texts if text is not None]
    index = answer if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(known) else None
    are_texts = known == choices
    if index is not None and not are_texts and str(answer) in known and known[index] != str(answer):
        raise BadSample(sample_id, f"answer={answer} is one of the choices and the number of another; write it as text")
    return known


def find_choice_letter(answer: object, choices: list[str], sample_id: str) -> str:
    """Return the letter of a choice that is given by index, letter or text.

    Raises:
        BadSample: there is no such choice.
    """
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    if (text := text_from_value(answer)) in choices:
        return letters[choices.index(text)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    raise BadSample(sample_id, f"answer={answer!r:.60}; it must be one of the choices, its number from 0 or its letter")
