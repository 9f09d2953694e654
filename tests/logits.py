"""Logits of a model in one piece, to compare with what is computed in chunks."""

from typing import Any

import torch

from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.models.text_loss import token_losses


def supervised_logits(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits at supervised positions, `(S, vocabulary)`, and their targets `(S,)`."""
    targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
    keep = targets != IGNORE_INDEX
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, logits_to_keep=keep, use_cache=False).logits, targets[keep]


def supervised_losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The losses at supervised positions, `(S,)`."""
    return token_losses(*supervised_logits(model, batch))
