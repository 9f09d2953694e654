"""Numbers of tensors for comparisons. Imports torch only."""

import torch
from torch import Tensor


def bound_infinite(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor in float64 on the CPU, with infinite numbers as the largest of a precision, by default its own.

    Logits that are too large for half precision are infinite in each of two passes, and their difference is no number.
    """
    limit = torch.finfo(dtype or tensor.dtype).max
    return tensor.detach().cpu().double().clamp(-limit, limit)
