"""Words are those that the tokenizer itself cuts a text into, and have as many tokens as it makes of them."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny_parts import Parts, byte_tokenizer
from vlm.data.encoding import word_counts
from vlm.data.encoding.word_counts import SPLIT_WORDS, find_pieces, make_word_counts

LETTERS = "".join(map(chr, range(128)))
PIECES = (
    *LETTERS,
    *"  \n\n\r\tsdmtlrve''",
    "'ll",
    "'RE",
    "it's",
    " a",
    "  a",
    "12",
    "1234",
    " 3",
    "...",
    " --\n",
    "\r\n",
)


def with_pre_tokenizer(pre_tokenizer: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """Return `byte_tokenizer`, cutting texts into words as `pre_tokenizer` does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def split_then_bytes(split: Any) -> Any:
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits_then_bytes(*, individual: bool) -> Any:
    digits = pre_tokenizers.Digits(individual_digits=individual)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


LLAMA, QWEN = SPLIT_WORDS
PRE_TOKENIZERS: dict[str, Any] = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt2, offsets of blanks": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False),
    "smollm": lambda: digits_then_bytes(individual=True),
    "digits together": lambda: digits_then_bytes(individual=False),
    "llama3": lambda: split_then_bytes(pre_tokenizers.Split(Regex(LLAMA), "isolated")),
    "qwen": lambda: split_then_bytes(pre_tokenizers.Split(Regex(QWEN), "isolated")),
}
"""How known tokenizers cut texts into words."""


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_words_and_their_tokens_are_those_of_the_tokenizer(name: str):
    tokenizer = with_pre_tokenizer(PRE_TOKENIZERS[name](), normalizers.NFC() if name == "qwen" else None)
    words = make_word_counts(tokenizer)
    assert words is not None
    backend: Any = tokenizer.backend_tokenizer
    draw = random.Random(name)
    texts = [LETTERS, *LETTERS, *("".join(draw.choices(PIECES, k=draw.randint(2, 12))) for _ in range(3_000))]
    texts = [text for text in texts if words.is_plain(text)]
    assert len(texts) > 2_000
    encoded = backend.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encoded, strict=True):
        cut = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert words.split(text) == cut, text
        assert words.count(cut) == len(encoding), text


FOREIGN = (*"é\u0301ﬁ´\u00a0“…😀ſ①\u2028", "e\u0301", "’s", "中文", " word", " of", "a b c")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC, normalizers.NFKD])
def test_texts_with_other_characters_have_as_many_tokens_in_pieces(name: str, normalizer: Any):
    tokenizer = with_pre_tokenizer(PRE_TOKENIZERS[name](), normalizer and normalizer())
    words = make_word_counts(tokenizer)
    assert words is not None
    backend: Any = tokenizer.backend_tokenizer
    draw = random.Random(name)
    for _ in range(500):
        text = "".join(draw.choices((*PIECES, *FOREIGN, *FOREIGN), k=draw.randint(2, 16)))
        if not words.is_plain(text):
            continue
        encoding = backend.encode(text, add_special_tokens=False)
        assert words.count_text(text) == len(encoding), text
        place = draw.randint(0, len(text))
        behind = sum(end > place for _, end in encoding.offsets)
        counts = words.count_parts(text, place)
        assert counts in (None, (len(encoding) - behind, behind)), (text, place)
        assert counts is None or all(start >= place for start, _ in encoding.offsets[len(encoding) - behind :])


def test_pieces_with_other_characters_end_between_words():
    text = "one two – three four five’s six seven"
    pieces = [text[start:end] for start, end in find_pieces(text)]
    assert pieces == ["one", " two – three", " four", " five’s", " six seven"]
    assert list(find_pieces("中文 word")) == [(0, 7)]


def bad_tokenizers(parts: Parts) -> dict[str, Any]:
    """Tokenizers whose tokens depend on more than words, or that are not known."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other = Regex(LLAMA + "|x")
    made = {
        "another expression": with_pre_tokenizer(split_then_bytes(pre_tokenizers.Split(other, "isolated"))),
        "removed": with_pre_tokenizer(split_then_bytes(pre_tokenizers.Split(Regex(LLAMA), "removed"))),
        "blank in front": with_pre_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "no words": with_pre_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        "lower case": with_pre_tokenizer(byte_level, normalizers.Lowercase()),
        "sentencepiece": AutoTokenizer.from_pretrained(parts.language_model("vicuna")),
        **{name: byte_tokenizer() for name in ("wide token", "cut", "dropout", "split")},
    }
    made["wide token"].add_tokens([AddedToken("<wide>", lstrip=True)])
    made["cut"].backend_tokenizer.enable_truncation(8)
    made["dropout"].backend_tokenizer.model.dropout = 0.1
    made["split"].split_special_tokens = True
    made["words"] = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    return made


def test_other_tokenizers_are_not_counted_by_words(parts: Parts):
    made = bad_tokenizers(parts)
    assert [name for name, tokenizer in made.items() if make_word_counts(tokenizer) is not None] == []


def test_texts_in_which_a_token_may_begin_are_not_plain():
    words = make_word_counts(byte_tokenizer())
    assert words is not None
    assert [text for text in ("a < b", "caf\u00e9", "<s>", "plain") if words.is_plain(text)] == ["caf\u00e9", "plain"]


def test_few_words_are_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(word_counts, "MAX_WORDS", 2)
    monkeypatch.setattr(word_counts, "LONGEST_WORD", 3)
    words = make_word_counts(byte_tokenizer())
    assert words is not None
    lengths = [words.count(["ab", "cd", "e" * 9, "fg", "ab"]) for _ in range(2)]
    assert lengths[0] == lengths[1]
    assert len(words._numbers) <= 2
    assert "e" * 9 not in words._numbers
