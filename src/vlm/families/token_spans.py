"""Ids of a text with the characters that each comes from, for tokenizers that tell no offsets.

Tokens are decoded one after the other and laid along the text. Where their texts are not the text itself (a tokenizer
that normalises what it reads), nothing says which token a character belongs to, and the text is refused.
"""

from transformers import PreTrainedTokenizerBase

from vlm.models.text_processing import Ids, Spans, encode_text

MAX_PIECE = 16
"""Tokens of one character at most: those of several bytes decode together."""
PROBE = "A question: what is 12 × 7,\n\n  and why? Grüße 你好 🙂.\tThe end"
"""A text whose tokens have to decode to it: blanks, line breaks, and characters of one to four bytes."""
UNDECODABLE = "\ufffd"
WORD_START = "▁"
"""How SentencePiece writes a blank."""


class UnfaithfulTokenizerError(ValueError):
    """A tokenizer's tokens do not decode to the text that they come from."""


def encode_with_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> tuple[Ids, Spans]:
    """Return the ids of a text and the characters that each comes from; special tokens that are added have `(0, 0)`.

    Raises:
        UnfaithfulTokenizerError: the tokenizer has no offsets, and its tokens do not decode to the text.
    """
    if tokenizer.is_fast:
        return encode_text(tokenizer, text, add_special_tokens=add_special_tokens)
    ids: Ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    spans = _lay_along(tokenizer, ids, text)
    if not add_special_tokens:
        return ids, spans
    whole: Ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    before = next((place for place in range(len(whole) - len(ids) + 1) if whole[place : place + len(ids)] == ids), None)
    if before is None:
        raise UnfaithfulTokenizerError(f"{_name(tokenizer)} splits a text differently when it adds special tokens")
    after = len(whole) - len(ids) - before
    return whole, [*[(0, 0)] * before, *spans, *[(0, 0)] * after]


def check_spans(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UnfaithfulTokenizerError where a tokenizer without offsets does not decode its tokens faithfully."""
    if not tokenizer.is_fast:
        encode_with_spans(tokenizer, PROBE)


def _lay_along(tokenizer: PreTrainedTokenizerBase, ids: Ids, text: str) -> Spans:
    """Return the characters of each id; the ids of a character that only decodes with others share it."""
    spans: Spans = []
    position = start = 0
    for end in range(1, len(ids) + 1):
        piece = _decode(tokenizer, ids[start:end])
        if UNDECODABLE in piece and not _is_whole(tokenizer, ids[start : end + 1], piece, text[position:]):
            if end - start >= MAX_PIECE:
                break
            continue
        if not text.startswith(piece, position):
            piece = piece.removeprefix(" ") if position == 0 else piece  # SentencePiece begins a text with a blank
            if not text.startswith(piece, position):
                break
        spans += [(position, position + len(piece))] * (end - start)
        position, start = position + len(piece), end
    if start < len(ids) or position < len(text):
        raise UnfaithfulTokenizerError(
            f"{_name(tokenizer)} has no offsets, and its tokens do not decode to the text at "
            f"{text[position:][:20]!r}: labels cannot be placed"
        )
    return spans


def _is_whole(tokenizer: PreTrainedTokenizerBase, ids: Ids, piece: str, text: str) -> bool:
    """Return whether a piece with the sign of an undecodable byte is the text's own, where `ids` has one id more.

    The bytes of that sign itself decode to it one by one.
    """
    return text.startswith(piece) and (text == piece or _decode(tokenizer, ids) != piece)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    """Return the text of some tokens with the blank that a word begins with, which decoding alone drops."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if isinstance(tokens[0], str) and tokens[0].startswith(WORD_START) and not text.startswith(" "):
        return f" {text}"
    return text


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return type(tokenizer).__name__
