"""What an answer must be: JSON, JSON of a schema, or text of a grammar; and the bytes of tokens.

llguidance compiles grammars, and says which tokens may come next. It is part of the extra `serve`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

import llguidance
import llguidance.hf
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

MAX_GRAMMAR_CHARACTERS = 65_536
"""The longest schema or grammar, in characters of its JSON."""
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,40}"
"""White space between the parts of JSON. It is bounded: models like to go on with line breaks for ever."""
LIMITS = llguidance.LLParserLimits(
    max_grammar_size=100_000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
"""Bounds of the time and memory of a grammar: about 20 ms and 50 MB to compile it, 10 ms for each token."""


@dataclass(frozen=True)
class Constraint:
    """A grammar that an answer keeps to, compiled once and used by any number of answers.

    Args:
        grammar: the grammar, in llguidance's own JSON.
        matcher: the compiled grammar at its beginning.
    """

    grammar: str
    matcher: llguidance.LLMatcher = field(repr=False, compare=False)


class ConstraintCompiler:
    """Compiles constraints for one tokenizer. CPU work: call it in a worker thread. Thread-safe.

    Args:
        tokenizer: the model's tokenizer.
        ends: ids of the tokens that end an answer; a constraint allows them once the answer is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]):
        self.tokenizer, self.ends = tokenizer, list(ends)
        self._lock = Lock()

    def json_object(self) -> Constraint:
        """Return the constraint that an answer is a JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, object] | bool) -> Constraint:
        """Return the constraint that an answer is JSON of a schema.

        Raises:
            ValueError: the schema is malformed, not supported, or too large; says why.
        """
        try:
            written = json.dumps({} if schema is True else schema)
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"the JSON schema is not valid JSON, or is nested too deep: {error}") from error
        _check_size("JSON schema", written)
        # A schema's own `x-guidance` would set these otherwise, and `lenient` passes over what is not supported.
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                written, overrides={"whitespace_pattern": WHITE_SPACE, "lenient": False, "coerce_one_of": True}
            )
        except ValueError as error:
            raise ValueError(f"the JSON schema is refused: {_one_line(str(error))}") from error
        return self._compile("JSON schema", grammar)

    def lark(self, grammar: str) -> Constraint:
        """Return the constraint that an answer is text of a grammar in llguidance's form of Lark.

        Raises:
            ValueError: the grammar is malformed or too large; says why.
        """
        _check_size("grammar", grammar)
        return self._compile("grammar", llguidance.LLMatcher.grammar_from_lark(grammar))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token's text; of a special token, its name's."""
        with self._lock:
            tokens = self._tokens
        if isinstance(tokens, ValueError) or token_id >= tokens.vocab_size or tokens.is_special_token(token_id):
            return str(self.tokenizer.decode([token_id])).encode()
        return tokens.decode_bytes([token_id])

    def _compile(self, name: str, grammar: str) -> Constraint:
        with self._lock:  # the first call reads the vocabulary, about a second's work
            tokens = self._tokens
        if isinstance(tokens, ValueError):
            raise ValueError(f"the {name} cannot be used: {tokens}")
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise ValueError(f"the {name} is refused: {_one_line(matcher.get_error())}")
        return Constraint(grammar, matcher)

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer | ValueError:
        """The vocabulary, or why this tokenizer's cannot be read."""
        try:
            return llguidance.hf.from_tokenizer(self.tokenizer, eos_token=self.ends or None)  # pyright: ignore[reportArgumentType] - a slow one raises ValueError
        except ValueError as error:
            return ValueError(f"this model's tokenizer does not allow it: {error}")


class ConstraintProcessor(LogitsProcessor):
    """Leaves the tokens that a constraint allows next; of one answer, which tells it each token by `accept`."""

    def __init__(self, constraint: Constraint):
        self.matcher = constraint.matcher.deep_copy()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with minus infinity at tokens that are not allowed: `(1, vocabulary)`.

        Raises:
            ValueError: the grammar takes too long at this place.
        """
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        allowed = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)).bitwise_and(1).bool().flatten()
        forbidden = torch.ones(scores.shape[1], dtype=torch.bool)  # an embedding may have rows without a token
        size = min(len(allowed), len(forbidden))
        forbidden[:size] = ~allowed[:size]
        return scores.masked_fill(forbidden.to(scores.device), -torch.inf)

    def accept(self, token_id: int) -> bool:
        """Take the answer's next token; return whether the answer is complete.

        Raises:
            ValueError: the token is not allowed, or the grammar takes too long at this place.
        """
        self.matcher.consume_token(token_id)
        self._check()
        return self.matcher.is_stopped()

    def _check(self) -> None:
        if self.matcher.is_error():
            reason = _one_line(self.matcher.get_error())
            raise ValueError(f"the answer cannot keep to its schema or grammar: {reason}")


def _check_size(name: str, text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise ValueError(f"the {name} has {len(text):,} characters; at most {MAX_GRAMMAR_CHARACTERS:,} are allowed")


def _one_line(reason: str) -> str:
    return f"{' '.join(reason.split()):.300}"
