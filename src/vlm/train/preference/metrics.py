"""What is logged of preferences: rewards of both sides, margins, accuracy, and the divergence from the reference."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from vlm.config.choices import PREFERENCE_METRICS as METRICS
from vlm.config.preference_schema import PreferenceOptions
from vlm.data.encoding.preference import CHOSEN, REJECTED
from vlm.evaluation.bootstrap import Score, bootstrap
from vlm.evaluation.loss_metrics import NUM_RESAMPLES
from vlm.evaluation.record_sums import RecordSums
from vlm.train.preference.losses import (
    SideScores,
    estimate_divergence,
    get_beta,
    needs_mismatches,
    record_losses,
    rewards,
    uses_reference,
)

ACCURACY = "reward_accuracy"


def metric_sums(sides: SideScores, options: PreferenceOptions, divergence: Tensor | None = None) -> Tensor:
    """Return the sum of each of `PREFERENCE_METRICS`, and of how many records it is: `(N, 5, 2)`, without gradient.

    The margin is that of pairs. A pair is right where its chosen reward is higher; a single reply of `kto` where its
    reward is on its side of the reference point. `kl` is the log-ratio of the reference to the model, a mean of the
    sides of a record, and for `kto` the log-ratio of the model to the reference on mismatched replies.
    """
    values, is_there = rewards(sides, options)[:, :2], sides.is_there[:, :2].float()
    is_pair = is_there.prod(dim=1)
    margin = (values[:, CHOSEN] - values[:, REJECTED]) * is_pair
    if needs_mismatches(options):
        assert divergence is not None
        zero = get_beta(options) * divergence.clamp(min=0)
        right = torch.stack([values[:, CHOSEN] > zero, values[:, REJECTED] < zero], dim=1).float() * is_there
        accuracy = right.sum(dim=1), is_there.sum(dim=1)
        mismatched = sides.is_there[:, -1].float()
        kl = sides.log_ratios[:, -1].detach(), mismatched
    else:
        accuracy = (margin > 0).float(), is_pair
        has_reference = is_pair * uses_reference(options)
        ratios = sides.log_ratios[:, :2].detach().mean(dim=1) if uses_reference(options) else margin
        kl = -ratios * has_reference, has_reference
    columns = [
        (values[:, CHOSEN], is_there[:, CHOSEN]),
        (values[:, REJECTED], is_there[:, REJECTED]),
        (margin, is_pair),
        accuracy,
        kl,
    ]
    return torch.stack([torch.stack(column, dim=-1) for column in columns], dim=1)


class StepMetrics:
    """Adds up what is logged of the steps since the last log."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """Add `metric_sums` of a batch."""
        total = sums.sum(dim=0)
        self._sums = total if self._sums is None else self._sums + total

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all ranks, and begin anew."""
        if self._sums is None:
            return {}
        sums = gather(self._sums[None]).sum(dim=0).cpu()
        self._sums = None
        return {name: float(total / number) for name, (total, number) in zip(METRICS, sums, strict=True) if number > 0}


def evaluate_records(sides: SideScores, options: PreferenceOptions) -> dict[str, RecordSums]:
    """Return the loss of a data set and `PREFERENCE_METRICS`, by record.

    The reference point of `kto` is estimated over all of them.
    """
    divergence = None
    if needs_mismatches(options):
        total, number = estimate_divergence(sides)
        divergence = total / number.clamp(min=1)
    losses = record_losses(sides, options, divergence)
    weights = count_items(sides, options)
    columns = torch.cat(
        [torch.stack([losses, weights], dim=1)[:, None], metric_sums(sides, options, divergence)], dim=1
    )
    table = columns.double().numpy()  # (N, 6, 2)
    return {name: RecordSums(table[:, at, 0], table[:, at, 1]) for at, name in enumerate(("loss", *METRICS))}


def bootstrap_records(metrics: Mapping[str, RecordSums]) -> dict[str, Score]:
    """Return metrics of the same records, with intervals over these."""
    table = np.stack([np.stack([one.sums, one.counts], axis=1) for one in metrics.values()], axis=1)

    def compute(rows: np.ndarray) -> dict[str, float]:
        """Return the metrics of some records."""
        sums = table[rows].sum(axis=0)
        return {
            name: total / number if number else float("nan")
            for name, (total, number) in zip(metrics, sums.tolist(), strict=True)
        }

    counts = metrics[ACCURACY].counts
    return bootstrap(
        compute,
        len(table),
        NUM_RESAMPLES,
        seed=0,
        shares=(ACCURACY,) if (counts == 1).all() else (),
        clustered_shares=(ACCURACY,) if (counts >= 1).all() else (),
    )


def count_items(sides: SideScores, options: PreferenceOptions) -> Tensor:
    """Return how many items of the mean loss each record has: `(N,)`, one for a pair, one for each reply of `kto`."""
    number = sides.is_there[:, :2].sum(dim=1).float()
    return number if options.loss == "kto" else number.clamp(max=1)
