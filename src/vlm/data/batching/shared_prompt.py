"""Merges conversations that differ only in their last replies into one sample, with their prompt only once.

Images of the prompt are encoded once, too. A packed row says which tokens each reply attends to (`packing.py`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from vlm.data.batching.collator import TEXT_KEYS
from vlm.data.batching.packing import BRANCHES, Branches
from vlm.data.dataset import LOSS_WEIGHTS
from vlm.data.encoding.labels import IGNORE_INDEX, get_media_token_ids
from vlm.data.processor import Processor, SampleInputs


@dataclass(frozen=True)
class BranchMerger:
    """Merges the conversations of a record, such as those of a preference.

    Attributes:
        media_ids: the ids at whose positions features of images and videos are placed.
        tokens: inputs with one value for each token, besides ids, labels and the weights of losses.
    """

    media_ids: Collection[int] = ()
    tokens: Sequence[str] = ()

    @classmethod
    def of(cls, processor: Processor, *tokens: str) -> "BranchMerger":
        """Make what merges the inputs of a processor; `tokens` are further ones with one value for each token."""
        return cls(get_media_token_ids(processor), (*processor.per_token_inputs, *tokens))

    def merge(self, sides: Sequence[SampleInputs]) -> SampleInputs | None:
        """Return conversations as one sample that branches; None if they share no prompt.

        The ids of each branch, after those that all share, are those of its conversation.
        """
        shared = self.count_shared(sides)
        if not shared:
            return None
        first, *others = sides
        merged: SampleInputs = dict(first)
        for name in (*TEXT_KEYS, LOSS_WEIGHTS, *self.tokens):
            if name in first:
                values = [first[name], *(side[name][shared:] for side in others)]
                merged[name] = torch.cat(values) if isinstance(first[name], Tensor) else [*chain(*values)]
        return merged | {BRANCHES: Branches(shared, tuple(len(side["input_ids"]) - shared for side in sides))}

    def count_shared(self, sides: Sequence[SampleInputs]) -> int:
        """Return the number of first tokens that all branches share; 0 if they cannot share any.

        These are the ids that all have in common before the first supervised token of any, but for the last one: each
        branch begins with that, where its own first token is predicted. Images and videos have to be among them, and
        equal.
        """
        first, *others = sides
        by_token = {*TEXT_KEYS, LOSS_WEIGHTS, *self.tokens}
        if not others or any(other.keys() != first.keys() for other in others):
            return 0
        whole = first.keys() - by_token
        if not all(_is_equal(first[name], other[name]) for other in others for name in whole):
            return 0
        shared = min(_count_common([side["input_ids"] for side in sides]), *map(_find_first_supervised, sides)) - 1
        if shared <= 0 or any(not {*side["input_ids"][shared:]}.isdisjoint(self.media_ids) for side in sides):
            return 0
        starts = ([side[name][:shared] for side in sides] for name in by_token - {*TEXT_KEYS} if name in first)
        return shared if all(_is_equal(start, other) for start, *rest in starts for other in rest) else 0


def _count_common(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of first ids that rows have in common."""
    length = min(map(len, rows))
    ids = np.array([row[:length] for row in rows])
    differs = (ids != ids[0]).any(0)
    return int(differs.argmax()) if differs.any() else length


def _find_first_supervised(inputs: SampleInputs) -> int:
    """Return the place of the first supervised token; the number of tokens if there is none."""
    is_supervised = np.asarray(inputs["labels"]) != IGNORE_INDEX
    return int(is_supervised.argmax()) if is_supervised.any() else len(is_supervised)


def _is_equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return type(one) is type(other) and one == other
