"""What a request asks of the engine, and what it gets: settings of sampling, and pieces of an answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, Literal

from vlm.inference.engine.constraints import Constraint

FinishReason = Literal["stop", "length"]
"""Why an answer ended: the model or a stop string ended it, or its tokens were used up."""


LEAST_TEMPERATURE = 1e-3
"""Lower temperatures but 0 would divide logits to infinity."""

BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: value >= 1, "must be at least 1"),
    "temperature": (
        lambda value: value == 0 or LEAST_TEMPERATURE <= value < inf,
        f"0, or from {LEAST_TEMPERATURE} on, is needed",
    ),
    "top_p": (lambda value: 0 < value <= 1, "more than 0, and at most 1, is needed"),
    "frequency_penalty": (isfinite, "a finite number is needed"),
    "presence_penalty": (isfinite, "a finite number is needed"),
    "seed": (lambda value: value is None or -(2**63) <= value < 2**63, "a whole number of 64 bits is needed"),
    "stop": (all, "no text may be empty"),
    "top_logprobs": (lambda value: value is None or value >= 0, "0 or more is needed"),
    "logit_bias": (lambda value: all(map(isfinite, value.values())), "finite numbers are needed"),
}
"""Option -> whether a value is allowed, and what is."""


@dataclass(frozen=True)
class SamplingOptions:
    """How one answer is generated. Each row of a batch has its own.

    Args:
        max_new_tokens: the largest number of tokens in the answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling: the smallest set of tokens whose probabilities sum up to it.
        frequency_penalty: taken off a token's logit for each time that it stands in the answer so far.
        presence_penalty: taken off a token's logit once it stands in the answer.
        seed: the seed of this answer's own random numbers; None: a new one.
        stop: texts that end the answer, and are not part of it.
        top_logprobs: number of alternatives whose log probabilities are wanted; 0: only the chosen token's; None: none.
        logit_bias: token id -> what is added to its logit.
        constraint: what the answer must be, such as JSON; from the engine's `constraints`.

    Raises:
        ValueError: a value is out of its bounds; names it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Constraint | None = None

    def __post_init__(self):
        """Check the values."""
        for name, (is_allowed, needed) in BOUNDS.items():
            if not is_allowed(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r:.60}: {needed}")


@dataclass(frozen=True)
class TokenAlternative:
    """A token with its log probability.

    Args:
        token_id: its id.
        token: its text; a replacement character stands for bytes that are no whole character.
        bytes: its UTF-8 bytes.
        logprob: its natural logarithm of the probability, by the model's own logits: before temperature, penalties,
            bias and constraint.
    """

    token_id: int
    token: str
    bytes: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(TokenAlternative):
    """The chosen token with its log probability, and the likeliest tokens of its place, likeliest first."""

    top: tuple[TokenAlternative, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. Joined, the texts of all pieces are the answer.

    Args:
        text: new text; whole characters only, and nothing that may still turn out to be a stop string. May be empty.
        token_ids: tokens that were generated since the last piece, the one that ended the answer included; their text
            may come with a later piece.
        logprobs: one for each of `token_ids` but the one with which the model ends, where they were asked for.
        finish_reason: why the answer ended, in the last piece only.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
