"""What a request asks of the engine, and what it gets: settings of sampling, and pieces of an answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vlm.inference.engine.constraints import Constraint

FinishReason = Literal["stop", "length"]
"""Why an answer ended: the model or a stop string ended it, or its tokens were used up."""


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
        logprobs: one for each of `token_ids` that is part of the answer, where they were asked for.
        finish_reason: why the answer ended, in the last piece only.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
