"""The loss of heads that embed: a query's vector is nearer to its positive's than to those of all others of a step.

Hub code: imports torch only.

Shapes: B rows of this rank, D numbers of a vector, Q queries of all ranks, C candidates of all ranks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

QUERY, POSITIVE, NEGATIVE = 0, 1, 2
"""What a row of a batch is. The queries of a batch and its positives stand in the same order."""
NO_ROLE = -1
"""The role of a row without a record."""
MIN_TEMPERATURE = 0.01
"""A learned temperature stays above (as CLIP's: Radford et al. 2021, arXiv:2103.00020, section 2.5)."""


class LogitScale(nn.Module):
    """The temperature by which similarities are divided, as a number of its own; learned or not.

    Args:
        temperature: the temperature at the start.
        learned: whether it trains.
    """

    def __init__(self, temperature: float, *, learned: bool):
        super().__init__()
        self.start = temperature
        value = torch.empty(1)  # DeepSpeed takes no parameter without a dimension
        if learned:
            self.log_temperature = nn.Parameter(value)
        else:
            self.register_buffer("log_temperature", value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the temperature at the start."""
        nn.init.constant_(self.log_temperature, math.log(self.start))

    def forward(self) -> Tensor:
        """Return the temperature, `()`."""
        return self.log_temperature[0].float().exp().clamp(min=MIN_TEMPERATURE if self.is_learned else 0)

    @property
    def is_learned(self) -> bool:
        """Whether the temperature trains."""
        return isinstance(self.log_temperature, nn.Parameter)


class StepRows(NamedTuple):
    """The rows of a step on all ranks.

    Attributes:
        vectors: `(rows, D)`, with gradients to the ranks that they come from.
        roles: `(rows,)`, see `QUERY`.
        keys: `(rows,)`: equal for equal contents.
        is_own: `(rows,)`: whether a row is of this rank.
        num_ranks: the number of ranks.
    """

    vectors: Tensor
    roles: Tensor
    keys: Tensor
    is_own: Tensor
    num_ranks: int = 1


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks, `(B, D) -> (rows, D)`; the gradient of a row is the sum of those that all ranks have."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int]) -> Tensor:
        """Return the rows of all ranks."""
        ctx.counts = counts
        return torch.cat(_all_gather(rows, counts))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the sum of all ranks' gradients of this rank's rows."""
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[dist.get_rank()], None


def _all_gather(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return the rows of each rank, which may have different numbers of them."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def gather_step(vectors: Tensor, roles: Tensor, keys: Tensor) -> StepRows:
    """Return the rows of all ranks, in the order of ranks; every rank calls this in each step."""
    own = torch.ones_like(roles, dtype=torch.bool)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return StepRows(vectors, roles, keys, own)
    sizes = [torch.zeros(1, dtype=torch.int64, device=roles.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(roles)], device=roles.device))
    counts = [int(size) for size in sizes]
    before = sum(counts[: dist.get_rank()])
    is_own = torch.zeros(sum(counts), dtype=torch.bool, device=roles.device)
    is_own[before : before + len(own)] = True
    gathered: Tensor = _GatherRows.apply(vectors, counts)
    roles, keys = (torch.cat(_all_gather(values, counts)) for values in (roles, keys))
    return StepRows(gathered, roles, keys, is_own, len(counts))


def contrastive(
    outputs: Tensor,
    targets: Tensor,
    groups: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    learned_temperature: bool = False,
    symmetric: bool = True,
    widths: Sequence[int] | None = None,
    width_weights: Sequence[float] | None = None,
) -> Tensor:
    """InfoNCE over the rows of all ranks: `(B, D), (B, 1), (B,) -> ()` (van den Oord et al. 2018, arXiv:1807.03748).

    For a query q with the positive p, `-log exp(q·p / t) / sum_c exp(q·c / t)`, where c are the positives and hard
    negatives of all records of the step, without those that are no negatives of q: whose content is that of p or of q,
    or whose own query has the content of q. The mean over the queries of all ranks: its gradient, averaged over ranks
    as data-parallel training does, is that of one rank with the joint batch.

    Args:
        outputs: vectors of length 1.
        targets: the role of each row, see `QUERY`; NaN for a row without a record.
        groups: equal for equal contents.
        temperature: t.
        learned_temperature: whether t trains, from `temperature` on (`LogitScale`); the head passes its value here.
        symmetric: whether each positive also has to find its query among all queries; the mean of both losses is taken.
        widths: Matryoshka (Kusupati et al. 2022, arXiv:2205.13147): the loss is the sum of those of the first `width`
            numbers of each vector, scaled to length 1; None: of whole vectors alone.
        width_weights: the factor of each width's loss; None: 1.
    """
    with torch.autocast(outputs.device.type, enabled=False):
        roles = targets[:, 0].nan_to_num(NO_ROLE).long()
        step = gather_step(outputs.float(), roles, groups.to(roles.device))
        return loss_of_step(step, temperature, symmetric, widths, width_weights)


def loss_of_step(
    step: StepRows,
    temperature: float | Tensor,
    symmetric: bool = True,
    widths: Sequence[int] | None = None,
    width_weights: Sequence[float] | None = None,
) -> Tensor:
    """Return this rank's share of the mean loss of a step, times the number of ranks; arguments as of `contrastive`."""
    losses = [
        factor * _loss_of_width(step._replace(vectors=vectors), temperature, symmetric)
        for vectors, factor in _vectors_of_widths(step, widths, width_weights)
    ]
    return torch.stack(losses).sum()


def _vectors_of_widths(
    step: StepRows, widths: Sequence[int] | None, width_weights: Sequence[float] | None
) -> Iterator[tuple[Tensor, float]]:
    """Yield the vectors of a step at each width, and the factor of its loss."""
    whole = step.vectors.shape[1]
    sizes = [whole] if widths is None else list(widths)
    factors = [1.0] * len(sizes) if width_weights is None else list(width_weights)
    for size, factor in zip(sizes, factors, strict=True):
        yield step.vectors if size == whole else shorten_vectors(step.vectors, size), factor


def shorten_vectors(vectors: Tensor, width: int) -> Tensor:
    """Return the first numbers of vectors, scaled to length 1: `(..., D) -> (..., width)`."""
    return F.normalize(vectors[..., :width], dim=-1)


def query_losses(
    step: StepRows,
    temperature: float | Tensor,
    symmetric: bool = True,
    widths: Sequence[int] | None = None,
    width_weights: Sequence[float] | None = None,
) -> Tensor:
    """Return the loss of each of this rank's queries, `(q,)`; arguments as of `contrastive`."""
    return sum(
        (
            factor * _losses_of_width(step._replace(vectors=vectors), temperature, symmetric)
            for vectors, factor in _vectors_of_widths(step, widths, width_weights)
        ),
        step.vectors.new_zeros(()),
    )


def _loss_of_width(step: StepRows, temperature: float | Tensor, symmetric: bool) -> Tensor:
    """Return the loss of whole vectors, see `loss_of_step`."""
    losses = _losses_of_width(step, temperature, symmetric)
    number = int((step.roles == QUERY).sum())
    return losses.sum() * step.num_ranks / max(number, 1) + 0 * step.vectors.sum()


def _losses_of_width(step: StepRows, temperature: float | Tensor, symmetric: bool) -> Tensor:
    """Return the loss of each of this rank's queries by whole vectors: `(q,)`."""
    queries, positives = step.roles == QUERY, step.roles == POSITIVE
    candidates = torch.cat([positives.nonzero()[:, 0], (step.roles == NEGATIVE).nonzero()[:, 0]])
    own = step.is_own[queries].nonzero()[:, 0]  # indices of this rank's queries, and of their positives
    query_keys, positive_keys, candidate_keys = step.keys[queries], step.keys[positives], step.keys[candidates]
    owners = F.pad(query_keys, (0, len(candidates) - len(query_keys)), value=NO_ROLE)  # hard negatives have none
    excluded = candidate_keys == positive_keys[own, None]
    excluded |= (candidate_keys == query_keys[own, None]) | (owners == query_keys[own, None])
    query_vectors, positive_vectors = step.vectors[queries], step.vectors[positives]
    losses = _losses(query_vectors[own] @ step.vectors[candidates].T / temperature, own, excluded)
    if symmetric:
        excluded = (query_keys == query_keys[own, None]) | (query_keys == positive_keys[own, None])
        excluded |= positive_keys == positive_keys[own, None]
        losses = (losses + _losses(positive_vectors[own] @ query_vectors.T / temperature, own, excluded)) / 2
    return losses


def _losses(logits: Tensor, right: Tensor, excluded: Tensor) -> Tensor:
    """Return the cross-entropy of each row with its right column: `(q, C), (q,), (q, C) -> (q,)`."""
    excluded = excluded.scatter(1, right[:, None], value=False)
    return F.cross_entropy(logits.masked_fill(excluded, -torch.inf), right, reduction="none")
