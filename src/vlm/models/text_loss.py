"""The loss of text: cross-entropy at supervised positions, in chunks where logits are many.

Hub code: imports torch only. Shapes: S supervised positions, D text width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""The label of a position that is not supervised."""

MAX_LOGITS = 2**26
"""The most logits of one chunk: 256 MiB in float32."""

Divisor = Tensor | int | None
"""The divisor of a summed loss; None: the number of supervised positions."""


def supervised_loss(logits: Tensor, targets: Tensor, num_items: Divisor, weights: Tensor | None = None) -> Tensor:
    """Compute the cross-entropy in float32 at the supervised positions: `(S, vocabulary), (S,) -> ()`.

    `-sum_s weight_s log softmax(logits_s)[target_s] / num_items`; by default weights are 1, and `num_items` is S. 0
    where nothing is supervised. Logits in half precision are converted in chunks.
    """
    num_chunks = 1 if logits.dtype == torch.float32 else max(-(-logits.numel() // MAX_LOGITS), 1)
    return chunked_loss(nn.Identity(), logits, targets, num_items, num_chunks, weights)


def chunked_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, num_items: Divisor, num_chunks: int, weights: Tensor | None = None
) -> Tensor:
    """Compute `supervised_loss` of a vocabulary head's logits, in chunks: `(S, D), (S,) -> ()`.

    The head is called `num_chunks` times whatever S is, and for several chunks as often again for the gradient, since
    ranks that shard its weights have to make the same calls.

    Args:
        head: `(…, D) -> (…, vocabulary)`.
        hidden: `(S, D)`, the hidden states at the supervised positions.
        targets: `(S,)`, the ids that they predict.
        num_items: the divisor of the sum; None: S.
        num_chunks: 1 or more.
        weights: `(S,)`, factors of the losses; None: all are 1.
    """
    inputs = [hidden, *(tensor.to(hidden.device) for tensor in (targets, weights) if tensor is not None)]
    with record_function("loss"):  # its name in profiles
        if num_chunks == 1:
            total = _chunk_loss(head, *inputs)
        else:
            chunks = zip(*(tensor.tensor_split(num_chunks) for tensor in inputs), strict=True)
            losses: list[Any] = [checkpoint(_chunk_loss, head, *chunk, use_reentrant=False) for chunk in chunks]
            total = torch.stack(losses).sum()
        return total / (max(targets.numel(), 1) if num_items is None else num_items)


def _chunk_loss(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    if weights is None:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    return (F.cross_entropy(head(hidden).float(), targets, reduction="none") * weights).sum()
