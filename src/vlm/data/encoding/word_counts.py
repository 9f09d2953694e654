"""The number of tokens of a text, word by word: for byte-level tokenizers and texts of ASCII characters.

Such a tokenizer cuts a text at its added tokens, cuts what lies between them into words by a regular expression, and
splits each word into tokens by itself. So a text has as many tokens as its words together, and each word has to be
split once only. Python's expressions find the same words as the tokenizer's where all characters are ASCII.
"""

import json
import re
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerBase

from vlm.models.text_processing import calls_backend

MAX_WORDS = 1 << 17
"""The most words whose number of tokens is kept."""
LONGEST_WORD = 64
"""Most characters of such a word."""
BYTE_CHARACTERS = str.maketrans({byte: chr(256 + byte) for byte in range(33)} | {127: chr(289)})
"""What stands for the bytes of ASCII that are not printed in the vocabularies of byte-level tokenizers."""

BLANKS = r"\t-\r "
END = rf"[{BLANKS}]+(?![^{BLANKS}])|[{BLANKS}]+"
GPT2_WORDS = rf"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^{BLANKS}A-Za-z0-9]+|{END}"
"""What `ByteLevel` looks for by itself."""


def _llama_words(digits: str) -> str:
    shortened = "'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])"
    marks = rf" ?[^{BLANKS}A-Za-z0-9]+[\r\n]*|[{BLANKS}]*[\r\n]+"
    return rf"{shortened}|[^\r\nA-Za-z0-9]?[A-Za-z]+|{digits}|{marks}|{END}"


def _written_llama_words(digits: str) -> str:
    """Return the expression of Llama 3 and Qwen as their tokenizers write it."""
    shortened, marks = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return rf"{shortened}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{marks}"


SPLIT_WORDS = {
    _written_llama_words(r"\p{N}{1,3}"): _llama_words("[0-9]{1,3}"),
    _written_llama_words(r"\p{N}"): _llama_words("[0-9]"),
}
"""Expression of a tokenizer's `Split` -> one that finds the same words in ASCII."""
DIGIT_WORDS = {
    individual: rf"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+|[0-9]{'' if individual else '+'}| ?[^{BLANKS}A-Za-z0-9]+|"
    rf"[{BLANKS}]+(?![^{BLANKS}0-9])|[{BLANKS}]+"
    for individual in (True, False)
}
"""What `ByteLevel` finds between the digits that `Digits` has set apart, by whether it sets each apart."""
PLAIN_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
"""They leave ASCII as it is."""


class WordCounts:
    """Numbers of tokens of words.

    Args:
        backend: the tokenizer; its model splits words into tokens.
        words: matches the words of a text of ASCII characters.
        added: the texts of the tokenizer's added tokens.

    Attributes:
        split: returns the words of a text of ASCII characters without added tokens, which joined are the text.
        starts: the characters that added tokens begin with.
        added: matches an added token.
    """

    def __init__(self, backend: Tokenizer, words: str, added: Sequence[str]):
        self.split = re.compile(words).findall
        self._added = tuple(added)
        self.starts = tuple(dict.fromkeys(token[0] for token in added))
        self.added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")
        self._encode = backend.encode
        self._numbers = _NumbersOfTokens(backend.model)

    def count(self, words: Sequence[str]) -> int:
        """Return the number of tokens of words."""
        return sum(map(self._numbers.__getitem__, words))

    def encode(self, text: str) -> tuple[int, list[tuple[int, int]]]:
        """Return the number of tokens of any text, and the characters that each comes from."""
        encoding = self._encode(text, add_special_tokens=False)
        return len(encoding), encoding.offsets

    def is_plain(self, text: str) -> bool:
        """Return whether no added token begins in a text."""
        for start in self.starts:  # noqa: SIM110 - a generator takes twice as long
            if start in text:
                return False
        return True

    def may_begin_token(self, text: str) -> bool:
        """Return whether a text ends as an added token begins, so that what follows it may complete one."""
        return any(text.endswith(token[:end]) for token in self._added for end in range(1, len(token)))


class _NumbersOfTokens(dict[str, int]):
    """Word -> its number of tokens, found out when it is first asked for."""

    def __init__(self, model: BPE):
        super().__init__()
        self.model = model

    def __missing__(self, word: str) -> int:
        number = len(self.model.tokenize(word.translate(BYTE_CHARACTERS)))
        if len(word) <= LONGEST_WORD:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = number
        return number


def make_word_counts(tokenizer: PreTrainedTokenizerBase) -> WordCounts | None:
    """Return what counts the tokens of words; None for a tokenizer that does not work word by word, as far as known."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not calls_backend(type(tokenizer)) or tokenizer.split_special_tokens:
        return None
    if backend.truncation is not None or backend.padding is not None or backend.encode_special_tokens:
        return None
    model, normalizer, pre_tokenizer = backend.model, backend.normalizer, backend.pre_tokenizer
    if type(model) is not BPE or model.dropout is not None or pre_tokenizer is None:
        return None
    if normalizer is not None and _settings(normalizer).get("type") not in PLAIN_NORMALIZERS:
        return None
    words = find_words(_settings(pre_tokenizer))
    added = list(backend.get_added_tokens_decoder().values())
    if words is None or any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    return WordCounts(backend, words, [token.content for token in added])


def _settings(part: Normalizer | PreTokenizer) -> dict[str, object]:
    return json.loads(part.__getstate__())


def find_words(pre_tokenizer: Mapping[str, object]) -> str | None:
    """Return the expression that finds the words of a pre-tokenizer, by its settings, in ASCII; None: not known."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [before, {"type": "ByteLevel", "add_prefix_space": False, **last}]}:
            pass
        case {"type": "ByteLevel", "add_prefix_space": False, **last}:
            return GPT2_WORDS if last.get("use_regex", True) else None
        case _:
            return None
    match before:
        case {"type": "Digits", "individual_digits": bool(individual)} if last.get("use_regex", True):
            return DIGIT_WORDS[individual]
        case {"type": "Split", "pattern": {"Regex": str(written)}, "behavior": "Isolated", "invert": False}:
            return None if last.get("use_regex", True) else SPLIT_WORDS.get(written)
        case _:
            return None
