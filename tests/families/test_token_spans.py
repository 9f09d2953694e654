"""Spans of tokens where the tokenizer has none: those of a fast tokenizer, or a refusal."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.families.tiny_families import TURN, tokenizer
from vlm.families.token_spans import PROBE, UnfaithfulTokenizerError, check_spans, encode_with_spans

TEXTS = (PROBE, "", "a", "  two  blanks ", "<|user|>what?<|end|>\n", "été 🙂🙂 \ufffd!")


class WithoutOffsets:
    """A tokenizer that answers as a slow one does, byte by byte."""

    is_fast = False

    def __init__(self, inner: PreTrainedTokenizerFast, *, lowers: bool = False):
        self.inner, self.lowers = inner, lowers

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """The ids of a text alone."""
        encoded = self.inner(text.lower() if self.lowers else text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoded["input_ids"]}

    def decode(self, ids: list[int], **options: bool) -> str:
        """The text of ids."""
        return str(self.inner.decode(ids, **options))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The tokens of ids."""
        return [str(token) for token in self.inner.convert_ids_to_tokens(ids)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("added", [False, True])
def test_the_ids_are_the_same_and_the_spans_hold_their_characters(text: str, added: bool):
    fast = tokenizer(TURN, bos="<s>")
    expected, spans = encode_with_spans(fast, text, add_special_tokens=added)
    ids, found = encode_with_spans(WithoutOffsets(fast), text, add_special_tokens=added)  # pyright: ignore[reportArgumentType]
    assert ids == expected
    assert found == spans
    assert "".join(text[a:b] for a, b in dict.fromkeys(found)) == text


def test_a_tokenizer_that_changes_the_text_is_refused():
    check_spans(WithoutOffsets(tokenizer(TURN)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnfaithfulTokenizerError, match=r"WithoutOffsets has no offsets.*at 'A question"):
        check_spans(WithoutOffsets(tokenizer(TURN), lowers=True))  # pyright: ignore[reportArgumentType]
