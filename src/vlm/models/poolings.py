"""Poolings: the hidden states of a prompt that a prediction head reads.

Hub code: imports torch and its siblings only. To add a pooling, add a row to `POOLINGS` and its code to
`pool_hidden_states`.

Shapes: B rows, T tokens a row, D width of the language model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMasks:
    """The kinds of the tokens of a batch; each mask is `(B, T)`, boolean.

    Attributes:
        prompt_mask: tokens of the prompt: neither padding nor an answer.
        media_mask: those of them at positions of images or videos.
        selected_mask: those of them that have the id that a head reads at.
    """

    prompt_mask: Tensor
    media_mask: Tensor
    selected_mask: Tensor


EVERY_TOKEN_POOLINGS = ("attention", "alltoken")
"""Poolings that need every token's hidden state, since their weights come before the mean."""

SPECIAL_TOKEN_POOLINGS = ("token", "query")
"""Poolings that read at a token: one of the user's choice, or a new one at the end of the prompt."""

POOLINGS: dict[str, str] = {
    "last": "the last token",
    "mean": "the mean over all tokens",
    "image": "the mean over the tokens of images",
    "text": "the mean over all other tokens",
    "attention": "a mean whose weights are learned",
    "query": "a learned token behind the prompt",
    "token": "the mean over those with a given id",
    "first": "the first token, which a causal model lets see nothing else: for comparison with earlier work",
    "alltoken": "the head answers at every token, and its answers are averaged: for comparison with earlier work",
}
"""Pooling -> description."""


def pool_hidden_states(pooling: str, hidden: Tensor, masks: TokenMasks) -> Tensor:
    """Pool hidden states in float32, without any weights.

    Returns:
        `(B, D)`; for `EVERY_TOKEN_POOLINGS` all hidden states `(B, T, D)`.

    Raises:
        ValueError: a row has no token to read.
    """
    if pooling in EVERY_TOKEN_POOLINGS:
        _require_tokens(masks.prompt_mask, pooling)
        return hidden.float()
    if pooling in ("last", "first"):
        order = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        _require_tokens(masks.prompt_mask, pooling)
        place = (masks.prompt_mask * (order if pooling == "last" else order.flip(0))).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), place].float()
    mask = {
        "mean": masks.prompt_mask, "image": masks.media_mask, "text": masks.prompt_mask & ~masks.media_mask,
        "token": masks.selected_mask, "query": masks.selected_mask,
    }[pooling]  # fmt: skip
    _require_tokens(mask, pooling)
    return mean_over_mask(hidden.float(), mask)


def mean_over_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the masked tokens of each row: `(B, T, D), (B, T) -> (B, D)`; 0 where there are none."""
    total = values.masked_fill(~mask.unsqueeze(-1), 0).sum(dim=1)  # others may be NaN
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _require_tokens(mask: Tensor, pooling: str) -> None:
    """Raise ValueError where a row has nothing to read."""
    if torch.compiler.is_compiling() or bool(mask.any(dim=1).all()):
        return
    row = int((~mask.any(dim=1)).nonzero()[0])
    hints = {
        "image": "it shows no image; choose another pooling for records of text only",
        "text": "it is nothing but images",
        "query": "the token of the head's query is missing behind its prompt (config.suffix)",
        "token": "the token that the head reads at (model.head.token) is not in its prompt",
    }
    raise ValueError(f"pooling={pooling}: row {row} has no token to read: {hints.get(pooling, 'it is empty')}")
