"""Shifts image inputs that are indices of another input's rows, when the inputs of samples are concatenated."""

from collections.abc import Mapping, Sequence
from math import prod

import torch

from vlm.data.processor import RowIndex, SampleInputs


def shift_indices(items: Sequence[SampleInputs], indices: Mapping[str, RowIndex]) -> None:
    """Add to the indices of each item, in place, the number of rows of the items before it; below 0 they mean none.

    Args:
        items: inputs of samples that are about to be concatenated, in order; any of them may lack images.
        indices: input -> the input whose rows it counts.
    """
    for name, (source, num_dims) in indices.items():
        present = [item for item in items if item.get(name) is not None]
        inner = [max(sizes) for sizes in zip(*(item[source].shape[1:num_dims] for item in present), strict=True)]
        before = 0
        for item in present:
            item[name] = torch.where(item[name] >= 0, item[name] + before, item[name])
            before += len(item[source]) * prod(inner)
