"""How far two models have drifted apart on what they write themselves: no reference is needed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.evaluation.bootstrap import Score
from vlm.evaluation.comparison.changes import Pair
from vlm.evaluation.paired import paired_difference, units_of


@dataclass(frozen=True)
class Drift:
    """Both models' losses on each other's answers, in nats a token.

    Attributes:
        dataset: the set of records.
        num_records: number of records that both models answered.
        same_answers: share of records with the same answer, 0 to 1.
        on_before: loss of the model after on the answers of the one before, minus that model's own; None: not measured.
        on_after: loss of the model before on the answers of the one after, minus that model's own; None: not measured.
    """

    dataset: str
    num_records: int
    same_answers: float
    on_before: Score | None
    on_after: Score | None


def compute_drift(dataset: str, pairs: Sequence[Pair]) -> Drift:
    """Return the drift on the records of a set.

    For an answer y of the model p, drawn greedily, `log p(y) - log q(y)` a token estimates how much less q expects what
    p writes; its mean over p's samples would be the Kullback-Leibler divergence of p from q.
    """
    rows = [(before, after) for before, after in pairs if before.answer is not None and after.answer is not None]
    same = [before.answer == after.answer for before, after in rows]
    on_before = [(before.own_loss, after.other_loss, before.media) for before, after in rows]
    on_after = [(after.own_loss, before.other_loss, before.media) for before, after in rows]
    share = float(np.mean(same)) if same else float("nan")
    return Drift(dataset, len(rows), share, _mean_rise(on_before), _mean_rise(on_after))


def _mean_rise(losses: Sequence[tuple[float | None, float | None, str]]) -> Score | None:
    """Return the mean difference of a writer's own loss and the other model's, over answers that have both."""
    known = [(own, other, media) for own, other, media in losses if own is not None and other is not None]
    if not known:
        return None
    own, other, media = zip(*known, strict=True)
    return paired_difference(np.array(own), np.array(other), units_of(media), is_bounded=False)
