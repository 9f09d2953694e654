"""Tokenising one text. Hub code: imports transformers only."""

from contextlib import suppress
from functools import cache

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Ids = list[int]
Spans = list[tuple[int, int]]
"""The characters that each id comes from."""


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> tuple[Ids, Spans]:
    """Return the ids of a text and the characters that each comes from, as a call of a fast tokenizer does.

    For a short text, what transformers does around the tokenizer takes several times as long as the tokenizer. The
    tokenizer is asked directly where nothing would change its ids: no class overrides the call, and no earlier call
    left it cutting, padding or splitting special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        backend is not None
        and calls_backend(type(tokenizer))
        and backend.truncation is None
        and backend.padding is None
        and backend.encode_special_tokens == tokenizer.split_special_tokens
    ):
        with suppress(TypeError):  # half of a surrogate pair, which the call below refuses as transformers does
            encoding = backend.encode(text, add_special_tokens=add_special_tokens)
            return encoding.ids, encoding.offsets
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


@cache
def calls_backend(kind: type) -> bool:
    """Return whether a call of a tokenizer of this class is that of every fast tokenizer."""
    if not issubclass(kind, PreTrainedTokenizerFast):
        return False
    own = kind.__mro__[: kind.__mro__.index(PreTrainedTokenizerFast)]
    return not any({"__call__", "_encode_plus", "_batch_encode_plus"} & vars(parent).keys() for parent in own)
