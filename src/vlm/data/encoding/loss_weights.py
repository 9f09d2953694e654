"""Weights of the losses of reply tokens: by source, and by patterns in the text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from vlm.data.encoding.markers import Span


@dataclass(frozen=True)
class LossWeights:
    """Factors of the losses of replies, in addition to a reply's own weight.

    Attributes:
        source: the factor of every token.
        patterns: regular expressions with the factors of tokens that have a character in one of their matches; of
            several that match, the last one counts.
    """

    source: float = 1.0
    patterns: tuple[tuple[str, float], ...] = ()

    @classmethod
    def make(cls, source: float, patterns: Mapping[str, float]) -> Self:
        """Return the weights of a source with the run's patterns."""
        return cls(source, tuple(patterns.items()))

    @property
    def is_one(self) -> bool:
        """Whether nothing is weighted."""
        return self.source == 1 and not self.patterns

    def factors(self, text: str, spans: Sequence[Span]) -> list[float]:
        """Return the factor of each token of a reply.

        Args:
            text: the rendered conversation.
            spans: the characters of `text` from which each token of the reply comes; patterns are searched for in all
                of them together.
        """
        factors = [self.source] * len(spans)
        start, stop = spans[0][0], spans[-1][1]
        for pattern, factor in self.patterns:
            for match in _compiled(pattern).finditer(text, start, stop):
                for place, (a, b) in enumerate(spans):
                    if a < match.end() and b > match.start():
                        factors[place] = self.source * factor
        return factors


ALL_ONE = LossWeights()
"""Weights with which every token counts the same."""


@lru_cache(64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)
