"""How often each supervised token of a batch counts in the loss."""

import torch
from torch import Tensor

from vlm.data.batching.stats import ModelInputs
from vlm.data.dataset import LOSS_WEIGHTS
from vlm.data.encoding.labels import IGNORE_INDEX


def supervised_weights(batch: ModelInputs) -> Tensor:
    """Return the weight of each supervised token that is predicted, 1 without weights: `(S,)`, float32."""
    is_supervised = batch["labels"][:, 1:] != IGNORE_INDEX
    if (weights := batch.get(LOSS_WEIGHTS)) is None:
        return torch.ones(int(is_supervised.sum()), device=is_supervised.device)
    return weights[:, 1:][is_supervised]
