"""Pieces of a rendered conversation, which are tokenised one by one: image tokens, and the texts between them.

Hub code: imports transformers and its sibling `text_processing` only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from .text_processing import span_finder

BLANKS = " ", "▁"
"""What SentencePiece reads as the start of a word."""

Piece = tuple[int, int, bool]
"""Start and end of a piece in its text, and whether it continues the text of the piece before it."""


@dataclass(frozen=True)
class TextSplitter:
    """Splits rendered conversations into pieces.

    Attributes:
        tokenizer: the language model's.
        image_token: the token that stands for an image.
        special_tokens: matches the special tokens of the tokenizer, and `image_token`.
        prepend_scheme: where the tokenizer starts a word by itself, see `read_prepend_scheme`.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token: str
    special_tokens: re.Pattern[str]
    prepend_scheme: str

    def split(
        self, text: str, user_spans: Sequence[tuple[int, int]], coordinate_tokens: re.Pattern[str] | None
    ) -> list[Piece]:
        """Split a text at images, after BOS and within special tokens that users spelled.

        Where a word starts behind every special token, also at blanks that follow one.

        Args:
            text: a rendered conversation.
            user_spans: character spans that users wrote, in order.
            coordinate_tokens: matches tokens that stay whole in users' texts, too.
        """
        starts = [(0, False)]
        is_spelled = span_finder(user_spans)
        for match in self.special_tokens.finditer(text):
            start, end = match.span()
            if is_spelled(start, end) and not (coordinate_tokens and coordinate_tokens.fullmatch(match.group())):
                starts.append((start + 1, True))  # neither half is a special token
            elif match.group() == self.image_token:
                starts += [(start, False), (end, False)]
            elif (start == 0 and match.group() == self.tokenizer.bos_token) or self._starts_word(text, match):
                starts.append((end, False))
        pairs = pairwise([*starts, (len(text), False)])
        return [(start, end, continues_text) for (start, continues_text), (end, _) in pairs if start < end]

    def lead(self, piece: str, continues_text: bool) -> str:
        """Return what a piece of text is tokenised behind, so that a word starts before it or does not.

        No word starts behind a token, which a piece that continues a text gets. Where the tokenizer starts one by
        itself, it leaves that out before a blank, and SentencePiece does not: such a piece gets a blank more.
        """
        if continues_text:
            return self.image_token
        return " " if self.prepend_scheme != "never" and piece.startswith(BLANKS) else ""

    def _starts_word(self, text: str, token: re.Match[str]) -> bool:
        """Return whether a word starts behind a special token, where the tokenizer would leave that out at a blank."""
        if self.prepend_scheme != "always" or not text.startswith(BLANKS, token.end()):
            return False
        number = self.tokenizer.convert_tokens_to_ids(token.group())
        assert isinstance(number, int)
        return not self.tokenizer.added_tokens_decoder[number].rstrip
