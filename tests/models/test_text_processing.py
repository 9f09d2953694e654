"""Tokenising one text: the ids and spans of a tokenizer's own call, whatever state it is in."""

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny_parts import byte_tokenizer, save_sentencepiece
from vlm.models import text_processing
from vlm.models.text_processing import LONG_TEXT, bounded_template, calls_backend, encode_text

TEXTS = ("", " ", "a cat", " a  cat\n", "naïve 猫 🐈\u200d⬛", "<s>what?<|im_end|>\n<image> two", "a" * 3000)


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer with a call of its own."""

    def _encode_plus(self, text: Any, *given: Any, **named: Any) -> Any:
        return super()._encode_plus(text.upper(), *given, **named)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    if request.param == "bytes":
        return byte_tokenizer("chatml")
    folder: Path = tmp_path_factory.mktemp("sentencepiece")
    save_sentencepiece(folder)
    return AutoTokenizer.from_pretrained(folder)


def as_called(tokenizer: PreTrainedTokenizerFast, text: str, *, special: bool) -> tuple[list[int], list[Any]]:
    encoded: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


@pytest.mark.parametrize("special", [False, True])
def test_ids_and_spans_are_those_of_a_call(tokenizer: PreTrainedTokenizerFast, special: bool):
    assert calls_backend(type(tokenizer))
    for text in (*TEXTS, "a long text. " * (LONG_TEXT // 10)):
        assert encode_text(tokenizer, text, add_special_tokens=special) == as_called(tokenizer, text, special=special)


def test_an_earlier_call_that_cut_and_padded_changes_nothing(tokenizer: PreTrainedTokenizerFast):
    expected = as_called(tokenizer, "a long text", special=False)
    tokenizer("a long text", truncation=True, max_length=2)
    assert encode_text(tokenizer, "a long text") == expected
    if tokenizer.pad_token is not None:
        tokenizer("a long text", padding="max_length", max_length=99)
        assert encode_text(tokenizer, "a long text") == expected


def test_special_tokens_are_split_where_the_tokenizer_is_to_split_them(tokenizer: PreTrainedTokenizerFast):
    text = f"a {tokenizer.eos_token} b"
    whole = encode_text(tokenizer, text)
    tokenizer.split_special_tokens = True
    try:
        assert encode_text(tokenizer, text) == as_called(tokenizer, text, special=False) != whole
    finally:
        tokenizer.split_special_tokens = False
    assert encode_text(tokenizer, text) == whole


def test_a_tokenizer_with_a_call_of_its_own_is_called(tokenizer: PreTrainedTokenizerFast):
    own = Shouting(tokenizer_object=tokenizer.backend_tokenizer)
    assert not calls_backend(Shouting)
    assert not calls_backend(dict)
    assert encode_text(own, "a cat")[0] == encode_text(tokenizer, "A CAT")[0]


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_on_a_conversation_ends(monkeypatch: pytest.MonkeyPatch):
    """By the processor time of its own thread, so that a slow machine ends none."""
    monkeypatch.setattr(text_processing, "MAX_TEMPLATE_SECONDS", 0.05)
    tokenizer = byte_tokenizer("{% if messages | length > 1 %}" + LOOPS + "{% endif %}x")
    question = {"role": "user", "content": "a"}
    with bounded_template():
        assert tokenizer.apply_chat_template([question], tokenize=False) == "x"
    said = r"^the chat template takes more than 0.05 s of processor time"
    with pytest.raises(ValueError, match=said), bounded_template():
        tokenizer.apply_chat_template([question, question], tokenize=False)
    assert sys.gettrace() is None
