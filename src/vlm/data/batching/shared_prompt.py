"""A preference pair as one sample: the chosen and the rejected reply behind a prompt that stands there once.

Images of the prompt are encoded once, too. A packed row says which tokens each reply attends to (`packing.py`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlm.data.batching.collator import TEXT_KEYS
from vlm.data.batching.packing import BRANCH, Branch
from vlm.data.dataset import LOSS_WEIGHTS
from vlm.data.encoding.labels import IGNORE_INDEX, get_media_token_ids
from vlm.data.processor import Processor, SampleInputs


@dataclass(frozen=True)
class PairMerger:
    """Merges conversations that differ in their replies.

    Attributes:
        media_ids: the ids at whose positions features of images and videos are placed.
        tokens: inputs with one value for each token, besides ids, labels and the weights of losses.
    """

    media_ids: Collection[int] = ()
    tokens: Sequence[str] = ()

    @classmethod
    def of(cls, processor: Processor, *tokens: str) -> "PairMerger":
        """Make what merges the inputs of a processor; `tokens` are further ones with one value for each token."""
        return cls(get_media_token_ids(processor), (*processor.per_token_inputs, *tokens))

    def merge(self, chosen: SampleInputs, rejected: SampleInputs) -> SampleInputs | None:
        """Return a conversation with its two replies as one sample that branches; None where they share no prompt.

        The ids of each branch, behind those that both share, are those of its conversation.
        """
        shared = self.count_shared(chosen, rejected)
        if not shared:
            return None
        merged: SampleInputs = dict(chosen)
        for name in (*TEXT_KEYS, LOSS_WEIGHTS, *self.tokens):
            if name in chosen:
                first, second = chosen[name], rejected[name][shared:]
                merged[name] = torch.cat([first, second]) if isinstance(first, Tensor) else [*first, *second]
        return merged | {BRANCH: Branch(len(chosen["input_ids"]), shared)}

    def count_shared(self, chosen: SampleInputs, rejected: SampleInputs) -> int:
        """Return the number of first tokens that both branches share; 0 where they cannot share any.

        These are the ids that both have in common before the first supervised token of either, but for the last one:
        each branch begins with that, where its own first token is predicted. Images and videos have to be among them,
        and equal.
        """
        sides, by_token = (chosen, rejected), {*TEXT_KEYS, LOSS_WEIGHTS, *self.tokens}
        if chosen.keys() != rejected.keys():
            return 0
        if not all(_is_equal(chosen[name], rejected[name]) for name in chosen.keys() - by_token):
            return 0
        shared = min(_common_length(chosen, rejected), *map(_first_supervised, sides)) - 1
        if shared <= 0 or any(not {*side["input_ids"][shared:]}.isdisjoint(self.media_ids) for side in sides):
            return 0
        values = [name for name in (LOSS_WEIGHTS, *self.tokens) if name in chosen]
        return shared if all(_is_equal(*(side[name][:shared] for side in sides)) for name in values) else 0


def _common_length(chosen: SampleInputs, rejected: SampleInputs) -> int:
    """Return the number of first ids that two conversations have in common."""
    length = min(len(chosen["input_ids"]), len(rejected["input_ids"]))
    first, second = (np.asarray(side["input_ids"][:length]) for side in (chosen, rejected))
    return int((first != second).argmax()) if (first != second).any() else length


def _first_supervised(inputs: SampleInputs) -> int:
    """Return the place of the first supervised token; the number of tokens where there is none."""
    is_supervised = np.asarray(inputs["labels"]) != IGNORE_INDEX
    return int(is_supervised.argmax()) if is_supervised.any() else len(is_supervised)


def _is_equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return type(one) is type(other) and one == other
