"""Losses of prediction heads on their raw outputs, in float32.

Hub code: imports torch and its siblings only. To add a loss, write a function whose keyword parameters are its options
and add it to `LOSSES` under the tasks that it serves; the first one of a task is its default.

Shapes: B rows, C labels, K numbers of a head (see `head_tasks.py`). Targets of rows without a label are NaN, and such
rows do not count.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrastive import contrastive


def binary_cross_entropy(outputs: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Binary cross-entropy, averaged over outputs: `(B, K), (B, K) -> (B,)`.

    `-w (t log p + (1 - t) log(1 - p))` with `p = sigmoid(output)` and `t = (1 - smoothing) target + smoothing / 2`.
    `weights` is `(2,)`, for no and yes (`binary`), or `(K,)`, for the yes of each label.
    """
    soft = targets * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(outputs, soft, reduction="none")
    return (losses * _binary_label_weights(targets, weights)).mean(dim=1)


def cross_entropy(outputs: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Cross-entropy over labels that exclude each other: `(B, C), (B, 1) -> (B,)`.

    `-w_y sum_c t_c log softmax(outputs)_c` for the label y, where `t_c = (1 - smoothing) [c = y] + smoothing / C`.
    `weights` is `(C,)`.
    """
    numbers = targets[:, 0].long()
    losses = F.cross_entropy(outputs, numbers, reduction="none", label_smoothing=smoothing)
    return losses if weights is None else losses * weights[numbers]


def focal(outputs: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float, *, gamma: float = 2.0) -> Tensor:
    """Cross-entropy that weighs confident right answers less (Lin et al. 2017, arXiv:1708.02002, equation 4).

    `(B, C), (B, 1) -> (B,)` for `multiclass`, else `(B, K), (B, K) -> (B,)`: the cross-entropy times `(1 - p)^gamma`,
    where p is the probability of the true label; `gamma=0` is plain cross-entropy.
    """
    if targets.shape[1] == 1 and outputs.shape[1] > 1:
        others = outputs.log_softmax(dim=1).scatter(1, targets.long(), -torch.inf)
        wrong = others.logsumexp(dim=1)  # (B,): the logarithm, whose power has a finite slope at 0 for every gamma
        return (gamma * wrong).exp() * cross_entropy(outputs, targets, weights, smoothing)
    wrong = F.logsigmoid(torch.where(targets > 0.5, -outputs, outputs))  # (B, K)
    soft = targets * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(outputs, soft, reduction="none")
    return ((gamma * wrong).exp() * losses * _binary_label_weights(targets, weights)).mean(dim=1)


def squared_error(outputs: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Squared error `(output - target)^2`: `(B, 1), (B, 1) -> (B,)`; ignores weights and smoothing."""
    return ((outputs - targets) ** 2)[:, 0]


def huber(outputs: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float, *, delta: float = 1.0) -> Tensor:
    """Huber's loss (1964): `(B, 1), (B, 1) -> (B,)`; ignores weights and smoothing.

    For an error e it is `e^2 / 2` up to `delta`, and `delta (|e| - delta / 2)` beyond.
    """
    return F.huber_loss(outputs, targets, reduction="none", delta=delta)[:, 0]


def ordinal(outputs: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Negative log-likelihood of a label among ordered ones: `(B, C - 1), (B, 1) -> (B,)`.

    Output k is the logit of being above label k, in falling order, see `heads.OrdinalThresholds` (McCullagh 1980):
    `P(label = k) = sigmoid(output_(k-1)) - sigmoid(output_k)`, the first term 1 for k = 0, the second 0 for k = C - 1.
    """
    low, high = F.logsigmoid(-outputs), F.logsigmoid(outputs)
    first, last = low[:, :1], high[:, -1:]  # at most the first label; above the last but one
    upper, lower = outputs[:, :-1], outputs[:, 1:]
    # log(sigmoid(a) - sigmoid(b)) for a > b, without a difference of numbers that are nearly alike; where rounding
    # leaves no gap between them, its logarithm and slope stay finite
    gap = -torch.expm1(-(upper - lower).clamp(min=0)) + torch.finfo(outputs.dtype).eps
    between = F.logsigmoid(upper) + F.logsigmoid(-lower) + gap.log()
    label_probabilities = torch.cat([first, between, last], dim=1)  # (B, C)
    numbers = targets[:, 0].long()
    losses = F.nll_loss(label_probabilities, numbers, reduction="none")
    losses = (1 - smoothing) * losses - smoothing * label_probabilities.mean(dim=1)
    return losses if weights is None else losses * weights[numbers]


Loss = Callable[..., Tensor]
LOSSES: dict[str, dict[str, Loss]] = {
    "binary": {"bce": binary_cross_entropy, "focal": focal},
    "multiclass": {"ce": cross_entropy, "focal": focal},
    "multilabel": {"bce": binary_cross_entropy, "focal": focal},
    "regression": {"mse": squared_error, "huber": huber},
    "ordinal": {"ordinal": ordinal},
}
"""Task -> name of a loss -> function of outputs `(B, K)`, targets, weights and smoothing to `(B,)`."""


def margin_ranking(outputs: Tensor, targets: Tensor, groups: Tensor, *, margin: float = 1.0) -> Tensor:
    """The mean over all pairs of a group of the better row's shortfall from a lead of `margin`: `(B, 1), (B, 1) -> ()`.

    `max(0, margin - (output_i - output_j))`, where row i has the higher target; 0 without pairs (Herbrich et al. 2000,
    "Large margin rank boundaries for ordinal regression"). Rows of different `groups` `(B,)` are not compared.
    """
    scores, worth = outputs[:, 0], targets[:, 0]
    better = (worth[:, None] > worth[None]) & (groups[:, None] == groups[None])  # NaN is not better than anything
    short = F.relu(margin - (scores[:, None] - scores[None]))
    return (short * better).sum() / better.sum().clamp(min=1)


STEP_LOSSES: dict[str, Loss] = {"pairwise": margin_ranking, "embedding": contrastive}
"""Task whose only loss compares rows -> function of outputs `(B, K)`, targets and groups to the loss."""


def head_loss(
    task: str,
    loss: str,
    outputs: Tensor,
    targets: Tensor,
    *,
    groups: Tensor | None = None,
    weights: Sequence[float] | None = None,
    smoothing: float = 0.0,
    options: Mapping[str, object] | None = None,
) -> Tensor:
    """Compute the loss of a head: the mean over the rows that have a label, 0 where none has; or over pairs of rows.

    Args:
        task: a name of `head_tasks.TASKS`.
        loss: the name of a loss of the task in `LOSSES`; not read for those of `STEP_LOSSES`.
        outputs: `(B, K)`; of `regression`, in standard deviations from the mean of the training labels.
        targets: `(B, C)` for `multilabel`, else `(B, 1)` or `(B,)`, in the same unit; NaN where a row has no label.
        groups: `(B,)`: `pairwise` compares rows of the same group; None: all rows. Of `embedding`, see `contrastive`.
        weights: the weight of each label, in their order.
        smoothing: the share of a target that is spread over all labels.
        options: the loss's keyword parameters, by name.

    Raises:
        KeyError: the task has no such loss.
    """
    outputs, targets = outputs.float(), targets.to(outputs.device).float().reshape(len(outputs), -1)
    options = options or {}
    if task in STEP_LOSSES:
        groups = torch.zeros(len(outputs), device=outputs.device) if groups is None else groups.to(outputs.device)
        return STEP_LOSSES[task](outputs, targets, groups, **options)
    known = ~targets.isnan().any(dim=1)
    losses = row_losses(task, loss, outputs, targets, weights=weights, smoothing=smoothing, options=options)
    return losses.where(known, 0).sum() / known.sum().clamp(min=1)


def row_losses(
    task: str,
    loss: str,
    outputs: Tensor,
    targets: Tensor,
    *,
    weights: Sequence[float] | None = None,
    smoothing: float = 0.0,
    options: Mapping[str, object] | None = None,
) -> Tensor:
    """Return the loss of each row, `(B,)`, which means nothing where a row has no label; arguments as of `head_loss`.

    Raises:
        KeyError: the task has no such loss, as those of `STEP_LOSSES`, which compare rows.
    """
    label_weights = None if weights is None else outputs.new_tensor(list(weights))
    return LOSSES[task][loss](outputs, targets.nan_to_num(), label_weights, smoothing, **(options or {}))


def _binary_label_weights(targets: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weight of each binary target: `(B, K), (2,) or (K,) -> (B, K)`."""
    if weights is None:
        return torch.ones_like(targets)
    if len(weights) == targets.shape[1]:
        return torch.where(targets > 0.5, weights, torch.ones_like(weights))
    return torch.where(targets > 0.5, weights[1], weights[0])
