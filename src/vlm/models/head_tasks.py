"""Tasks of prediction heads: how many outputs a head has, what they mean, and which labels are chosen by them.

Hub code: imports torch only. To add a task, add a row to `NUM_OUTPUTS_BY_TASK`, its meaning to `probabilities` and
`choose_labels`, and its loss to `head_losses.py`.

Shapes: N samples, C labels, K outputs of a head for a sample.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NUM_OUTPUTS_BY_TASK: dict[str, Callable[[int], int]] = {
    "binary": lambda labels: 1,
    "multiclass": lambda labels: labels,
    "multilabel": lambda labels: labels,
    "regression": lambda labels: 1,
    "ordinal": lambda labels: labels - 1,
    "pairwise": lambda labels: 1,
}
"""Task -> the number of outputs (K) of its head for a number of labels (C).

The labels of `binary` are the negative and the positive one; `regression` and `pairwise` have none.
"""

EMBEDDING = "embedding"
"""The task whose outputs are a vector of length 1, compared with those of others; its width is the head's own."""

TASKS = (*NUM_OUTPUTS_BY_TASK, EMBEDDING)
"""All tasks."""

CLASSIFICATION_TASKS = ("binary", "multiclass", "multilabel", "ordinal")
"""The tasks that choose among labels."""


def probabilities(task: str, outputs: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the probability of each label, in at least float32: `(N, K) -> (N, C)`.

    `outputs` are the logits of the positive label (`binary`), of each (`multiclass`, `multilabel`), or of being above
    each label but the last (`ordinal`); `temperature` divides them (Guo et al. 2017, arXiv:1706.04599). Rows add up to
    1, but for `multilabel`, whose labels do not exclude each other.
    """
    scaled = (outputs if outputs.dtype == torch.float64 else outputs.float()) / temperature
    if task == "multiclass":
        return scaled.softmax(dim=1)
    if task == "multilabel":
        return scaled.sigmoid()
    above = scaled.sigmoid()  # (N, C - 1): binary is the ordinal task of two labels
    ones = above.new_ones(len(above), 1)
    return torch.cat([ones, above], dim=1) - torch.cat([above, 0 * ones], dim=1)


def choose_labels(task: str, label_probabilities: Tensor, threshold: float | Sequence[float] | None = None) -> Tensor:
    """Choose labels by their probabilities: `(N, C) -> (N,)`, the index of the most probable, for `ordinal` the median.

    For `multilabel`, return `(N, C)`: whether each label is chosen. `threshold` is the least probability at which the
    positive label is chosen (`binary`), or each label (`multilabel`, one number for each); it defaults to 0.5.
    """
    least = label_probabilities.new_tensor(0.5 if threshold is None else threshold)
    if task == "multilabel":
        return label_probabilities >= least
    if task == "multiclass":
        return label_probabilities.argmax(dim=1)
    if task == "binary":
        return (label_probabilities[:, 1] >= least).long()
    return (label_probabilities.cumsum(dim=1)[:, :-1] < 0.5).sum(dim=1)
