"""A proposed share of replay: how much data of what a model could do already to mix into the next finetune.

The rule is a heuristic, stated in `docs/compare-models.md` with its limits and the figures that it was held against:
where the answers of a group clearly got worse, `SHARE`, however large the drop is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.evaluation.comparison.changes import ALL, LOSS, Change
from vlm.evaluation.comparison.records import PROBE

SHARE = 0.25
"""Share of the training samples that is proposed."""
MEASURABLE = 0.2
"""The share of right answers before that an ability needs, so that losing it could be seen."""


@dataclass(frozen=True)
class ReplayProposal:
    """A share of replay, and the groups behind it.

    Attributes:
        share: of all training samples, 0 to 1.
        drops: group -> its relative drop, `(before - after) / before`; the largest first.
        unmeasured: groups of which too little was right before to be lost visibly.
    """

    share: float
    drops: dict[str, float]
    unmeasured: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the proposal in sentences."""
        names = ", ".join(self.unmeasured)
        limit = f" Cannot be measured here: {names}; the model before has less than {MEASURABLE:.0%} right."
        unmeasured = limit if names else ""
        if not self.drops:
            return f"No replay is proposed: the answers of no group clearly got worse.{unmeasured}"
        named = ", ".join(f"{group} (-{drop:.0%})" for group, drop in self.drops.items())
        return (
            f"Replay {self.share:.0%}: of 100 training samples, {100 * self.share:.0f} like those that were forgotten: "
            f"{named}. A starting point: compare again after the next run.{unmeasured}"
        )


def weight_of_source(share: float, num_samples: int, num_replayed: int) -> float:
    """Return `dataset.sources.….weight` of a source of replay, for a share of all samples of an epoch.

    Args:
        share: of replay in all samples, from 0 to below 1.
        num_samples: number of the other samples of an epoch.
        num_replayed: number of samples of the source of replay.
    """
    return share / (1 - share) * num_samples / num_replayed


def propose_replay(changes: Sequence[Change]) -> ReplayProposal:
    """Return the proposal that follows from the changes of answers to records with their images."""
    measured = [change for change in changes if not change.is_blank and change.measure != LOSS and change.split != ALL]
    main = {change.dataset: change.measure for change in reversed(measured)}  # the first metric of each set
    groups = [change for change in measured if change.measure == main[change.dataset]]
    drops = {
        name_of(change): (change.before - change.after) / change.before for change in groups if change.direction < 0
    }
    drops = dict(sorted(drops.items(), key=lambda item: -item[1]))
    too_low = [change for change in groups if change.before < MEASURABLE and change.dataset == PROBE]
    return ReplayProposal(SHARE if drops else 0.0, drops, tuple(name_of(change) for change in too_low))


def name_of(change: Change) -> str:
    """Return the name of a group for people: `probe: reading`, `held-out, kind: colour`."""
    if change.split == ALL:
        return change.dataset
    split = "" if change.dataset == PROBE else f", {change.split}"
    return f"{change.dataset}{split}: {change.group}"
