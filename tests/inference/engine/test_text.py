"""Text from tokens as they come: whole characters, stop strings, white space."""

import random

import pytest

from tests.families.tiny_families import tokenizer as family_tokenizer
from tests.tiny_parts import byte_tokenizer
from vlm.inference.engine.text import WINDOW, AnswerText, TokenDecoder

TEXT = "naïve 👩‍👩‍👧 日本語, ok — “x” é"


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte."""
    return family_tokenizer(None)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("repeats", [1, 40])
def test_characters_are_never_split_and_all_of_them_come(tokenizer, repeats: int):
    decoder = TokenDecoder(tokenizer)
    pieces = [decoder.push(token) for token in encode(tokenizer, TEXT * repeats)]
    assert all("�" not in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == TEXT * repeats
    assert len(TEXT.encode()) * repeats > WINDOW or repeats == 1


def test_bytes_that_are_no_character_are_those_of_decoding_at_once(tokenizer):
    draw = random.Random(0)
    for length in (1, 3, 7, 30, WINDOW + 200):
        ids = [draw.randrange(256) for _ in range(length)]
        decoder = TokenDecoder(tokenizer)
        found = "".join(decoder.push(token) for token in ids) + decoder.flush()
        assert found == tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_have_no_text():
    words = byte_tokenizer("chatml")
    decoder = TokenDecoder(words)
    ids = [*encode(words, "a cat"), words.eos_token_id, *encode(words, " sat")]
    assert "".join(decoder.push(token) for token in ids) + decoder.flush() == "a cat sat"


def push_all(text: AnswerText, tokenizer, written: str) -> list[str]:
    pieces = []
    for token in encode(tokenizer, written):
        pieces.append(text.push(token))
        if text.is_stopped:
            break
    return [*pieces, text.flush()]


@pytest.mark.parametrize(("stops", "written", "expected"), [
    (["END"], "one END two", "one"),
    (["END"], "one EN", "one EN"),
    (["END"], "EEND", "E"),
    (["aab"], "aaab", "a"),
    (["日本"], "x日日本語", "x日"),
    (["bc", "b"], "abc", "a"),
    (["longer stop", "er"], "a longer stop", "a long"),
    (["\n"], "\nno", ""),
    ([], "  two lines \n\n", "two lines"),
    (["x"], "", ""),
])  # fmt: skip
def test_an_answer_ends_before_its_first_stop_string(tokenizer, stops: list[str], written: str, expected: str):
    text = AnswerText(tokenizer, stops)
    pieces = push_all(text, tokenizer, written)
    assert "".join(pieces) == expected
    assert text.is_stopped == any(stop in written for stop in stops)
    for end in range(len(pieces)):  # nothing came that was taken back
        assert expected.startswith("".join(pieces[:end]))


def test_text_that_begins_no_stop_string_comes_at_once(tokenizer):
    text = AnswerText(tokenizer, ["END"])
    pieces = [text.push(token) for token in encode(tokenizer, "aE bEN c")]
    assert pieces == ["a", "", "E", " b", "", "", "EN", " c"]
