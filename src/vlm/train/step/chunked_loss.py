"""The number of chunks in which the supervised positions of a batch go through the vocabulary head."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from vlm.assembly.checkpoint import is_composed_model
from vlm.assembly.model_interface import TrainableModel
from vlm.models.text_loss import IGNORE_INDEX, MAX_LOGITS

log = logging.getLogger(__name__)

NUM_CHUNKS_KEY = "num_chunks"
"""The input of the composed model that has the number."""

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Keys of configurations that change logits after the vocabulary head."""


@torch.no_grad()
def supports_chunked_loss(model: TrainableModel) -> bool:
    """Return whether a model's loss can be computed in chunks: it is composed, and its logits are its head's output."""
    if not is_composed_model(model):
        return False
    text = model.language_model
    config = text.config
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_TRANSFORMS):
        return False
    inputs = {"input_ids": torch.arange(2, device=text.device)[None], "use_cache": False}
    head: Any = text.get_output_embeddings()
    was_training = text.training
    text.train()  # in evaluation mode, quantised weights on a CPU change their layout
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits = text(**inputs).logits
        torch.manual_seed(0)
        same = torch.equal(head(model.get_decoder()(**inputs).last_hidden_state), logits)
    text.train(was_training)
    if not same:
        log.info("%s does more to its logits than its head does: they are computed at once", type(text).__name__)
    return same


def num_chunks(labels: Tensor, vocabulary: int, device: torch.device) -> int:
    """Return how many chunks keep each at no more than `MAX_LOGITS` logits, for labels `(B, T)`.

    Under ZeRO-3, the number of the rank that needs most, since all ranks gather the head's weights at each call.
    """
    supervised = int((labels[:, 1:] != IGNORE_INDEX).sum())
    number = max(-(-supervised * vocabulary // MAX_LOGITS), 1)
    if not (is_deepspeed_zero3_enabled() and dist.is_initialized()):
        return number
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
