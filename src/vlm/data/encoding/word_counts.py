"""The number of tokens of a text, word by word: for byte-level tokenizers, and texts mostly of ASCII characters.

Such a tokenizer cuts a text at its added tokens, cuts what lies between them into words by a regular expression, and
splits each word into tokens by itself. So a text has as many tokens as its words together, and each word has to be
split once only. Python's expressions find the same words as the tokenizer's where all characters are ASCII; of other
texts, the tokenizer itself splits the few words around other characters.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

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
NOT_ASCII = re.compile(r"[^\x00-\x7f]")
CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")
"""What is before a cut: wherever a blank separates two letters of ASCII, one word ends and another one begins, whatever
stands around them, and no normalizer changes the letters or joins them with anything."""


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
        self._numbers_of_pieces: dict[str, int] = {}

    def count(self, words: Sequence[str]) -> int:
        """Return the number of tokens of words."""
        return sum(map(self._numbers.__getitem__, words))

    def count_text(self, text: str) -> int:
        """Return the number of tokens of a text without added tokens."""
        if text.isascii():
            return self.count(self.split(text))
        return sum(self._count_piece(text[start:end]) for start, end in find_pieces(text))

    def count_parts(self, text: str, place: int) -> tuple[int, int] | None:
        """Return the numbers of tokens before and behind a place in a text; None if a token may reach over it."""
        if text.isascii():
            return self._count_parts_of_words(text, place)
        before = behind = 0
        for start, end in find_pieces(text):
            piece = text[start:end]
            if end <= place:
                before += self._count_piece(piece)
            elif start >= place:
                behind += self._count_piece(piece)
            else:
                count = self._count_parts_of_words if piece.isascii() else self._count_parts_of_tokens
                if (counts := count(piece, place - start)) is None:
                    return None
                before, behind = before + counts[0], behind + counts[1]
        return before, behind

    def _count_piece(self, piece: str) -> int:
        if piece.isascii():
            return self.count(self.split(piece))
        number = self._numbers_of_pieces.get(piece)
        if number is None:
            number = len(self._encode(piece, add_special_tokens=False))
            if len(piece) <= LONGEST_WORD:
                if len(self._numbers_of_pieces) >= MAX_WORDS:
                    self._numbers_of_pieces.clear()
                self._numbers_of_pieces[piece] = number
        return number

    def _count_parts_of_words(self, text: str, place: int) -> tuple[int, int] | None:
        words = self.split(text)
        number = length = 0
        while length < place:
            length += len(words[number])
            number += 1
        return (self.count(words[:number]), self.count(words[number:])) if length == place else None

    def _count_parts_of_tokens(self, text: str, place: int) -> tuple[int, int] | None:
        spans = self._encode(text, add_special_tokens=False).offsets
        behind = sum(end > place for _, end in spans)
        is_apart = all(start >= place for start, _ in spans[len(spans) - behind :])
        return (len(spans) - behind, behind) if is_apart else None

    def is_plain(self, text: str) -> bool:
        """Return whether no added token begins in a text."""
        for start in self.starts:  # noqa: SIM110 - a generator takes twice as long
            if start in text:
                return False
        return True

    def may_begin_token(self, text: str) -> bool:
        """Return whether a text ends as an added token begins, so that what follows it may complete one."""
        return any(text.endswith(token[:end]) for token in self._added for end in range(1, len(token)))


def find_pieces(text: str) -> Iterator[tuple[int, int]]:
    """Yield the bounds of pieces that are split into tokens independently: those with other characters than ASCII, as
    short as cuts allow, and those between them.
    """
    begin = 0
    while (match := NOT_ASCII.search(text, begin)) is not None:
        start = _last_cut(text, begin, match.start())
        cut = CUT.search(text, match.end())
        end = cut.end() if cut else len(text)
        if start > begin:
            yield begin, start
        yield start, end
        begin = end
    if begin < len(text):
        yield begin, len(text)


def _last_cut(text: str, begin: int, end: int) -> int:
    """Return the last cut of a stretch of ASCII characters, or its beginning."""
    place = end
    while (place := text.rfind(" ", begin, place)) > begin:
        if CUT.match(text, place - 1):
            return place
    return begin


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
