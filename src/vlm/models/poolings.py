"""Poolings: the hidden states of a prompt that a prediction head reads.

Hub code: imports torch only. To add a pooling, add a row to `POOLINGS` and its code to
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

NO_TOKEN_HINTS = {
    "image": "it has no image; choose another pooling for records of text only",
    "text": "it consists of images only",
    "query": "the token of the head's query is missing behind its prompt (config.suffix)",
    "token": "the token that the head reads at (model.head.token) is not in its prompt",
}
"""Pooling -> why a row may have no token to read."""


def pool_hidden_states(pooling: str, hidden: Tensor, masks: TokenMasks) -> Tensor:
    """Pool hidden states in float32: `(B, T, D) -> (B, D)`; for `EVERY_TOKEN_POOLINGS` return all, `(B, T, D)`.

    Raises:
        ValueError: the pooling is unknown, or a row has no token to read.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling}: allowed are {', '.join(POOLINGS)}")
    prompt, media, selected = masks.prompt_mask, masks.media_mask, masks.selected_mask
    masks_by_pooling = {"image": media, "text": prompt & ~media, "token": selected, "query": selected}
    mask = masks_by_pooling.get(pooling, prompt)
    if not torch.compiler.is_compiling() and not bool(mask.any(dim=1).all()):
        row = int((~mask.any(dim=1)).nonzero()[0])
        hint = NO_TOKEN_HINTS.get(pooling, "it is empty")
        raise ValueError(f"pooling={pooling}: row {row} has no token to read: {hint}")
    if pooling in EVERY_TOKEN_POOLINGS:
        return hidden.float()
    if pooling in ("last", "first"):
        order = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        place = (mask * (order if pooling == "last" else order.flip(0))).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), place].float()
    return mean_over_mask(hidden.float(), mask)


def mean_over_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the masked tokens of each row: `(B, T, D), (B, T) -> (B, D)`; 0 where there are none."""
    total = values.masked_fill(~mask.unsqueeze(-1), 0).sum(dim=1)  # others may be NaN
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)
