"""Divergences of a student's distribution over the next token from its teacher's, over all tokens or over a few.

Shapes: S positions, V tokens, k tokens that are kept. p is the teacher's distribution, q the student's, both at one
temperature. All is computed in float32.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST = float(torch.finfo(torch.float16).min)
"""The lowest log-probability: that of tokens which a model rules out, so that no product of 0 and infinity is made."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Computes a divergence of log-probabilities: `(S, V), (S, V) -> (S,)`, the teacher's first."""


def forward_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p | q) = sum p (log p - log q): the student covers all that the teacher finds likely."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def reverse_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(q | p) = sum q (log q - log p): the student avoids what the teacher finds unlikely."""
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def jensen_shannon_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (KL(p | m) + KL(q | m)) / 2 with m = (p + q) / 2, at most log 2 (Lin 1991, equation 4.1 at equal weights).

    The tokens of replies are the records', so that this is the generalised divergence of Agarwal et al. (2024,
    arXiv:2306.13649, equation 3) at beta = 1/2.
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (forward_divergence(log_p, log_m) + forward_divergence(log_q, log_m)) / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward": forward_divergence,
    "reverse": reverse_divergence,
    "jensen_shannon": jensen_shannon_divergence,
}
"""`trainer.distillation.divergence` -> what computes it."""


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities of logits that are divided by a temperature: `(S, V) -> (S, V)`."""
    return F.log_softmax(logits.float() / temperature, dim=-1).clamp_min(LOWEST)


def coarse_log_probabilities(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities of a few tokens, and of all others as one class: `(S, V), (S, k) -> (S, k + 1)`.

    Where the ids are the whole vocabulary there are no others: `(S, V)`.
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    chosen = scaled.gather(-1, ids)
    if ids.shape[-1] < scaled.shape[-1]:
        others = scaled.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        chosen = torch.cat([chosen, others], dim=-1)
    return (chosen - total).clamp_min(LOWEST)


def encode_rows(logits: Tensor, top_k: int, temperature: float) -> Tensor:
    """Return what is kept of a teacher's logits: `(S, V) -> (S, bytes)`, uint8.

    Of each position the ids of its `top_k` most likely tokens, the likeliest first, as int32, then their
    log-probabilities at the temperature and that of all other tokens, as float16.
    """
    ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices
    values = coarse_log_probabilities(logits, ids, temperature).half()
    return torch.cat([ids.int().contiguous().view(torch.uint8), values.contiguous().view(torch.uint8)], dim=-1)


def row_bytes(top_k: int, vocabulary: int) -> int:
    """Return how many bytes `encode_rows` keeps of a position."""
    num_ids = min(top_k, vocabulary)
    return 4 * num_ids + 2 * (num_ids + (num_ids < vocabulary))


def decode_rows(rows: Tensor, top_k: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return the ids `(S, k)` and log-probabilities `(S, k + 1)` of `encode_rows`; of the whole vocabulary, `(S, V)`.

    The probabilities of a position, rounded to half precision on disk, add up to 1 again.
    """
    num_ids = min(top_k, vocabulary)
    parts = rows[:, : 4 * num_ids], rows[:, 4 * num_ids :]
    ids, values = (part.clone(memory_format=torch.contiguous_format).view(-1) for part in parts)
    ids = ids.view(torch.int32).view(len(rows), num_ids).long()
    log_p = values.view(torch.float16).view(len(rows), num_ids + (num_ids < vocabulary)).float()
    return ids, F.log_softmax(log_p, dim=-1).clamp_min(LOWEST)
