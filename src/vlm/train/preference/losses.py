"""Losses of preferences: of log-probabilities of both sides, and of a reference model's, in float32.

`docs/preference.md` has the formulas. To add a loss, write a function `(sides, options) -> (records,)`, and add it to
`PAIR_LOSSES` and its name to `vlm.config.choices.PREFERENCE_LOSSES`. Shapes: N records.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.config.choices import REFERENCE_FREE_LOSSES
from vlm.config.preference_schema import PreferenceOptions
from vlm.data.encoding.preference import CHOSEN, MISMATCHED, REJECTED

NUM_ROLES = 3


@dataclass(frozen=True)
class SideScores:
    """What the losses are computed from: a column for each role, `CHOSEN`, `REJECTED` and `MISMATCHED`.

    Attributes:
        log_probs: `(N, 3)`: the sum of log-probabilities of a side's supervised tokens, float32; 0 where there is none.
        tokens: `(N, 3)`: the number of these tokens; 0 where a record has no such side.
        reference: `(N, 3)`: `log_probs` of the reference model; None for losses without one.
    """

    log_probs: Tensor
    tokens: Tensor
    reference: Tensor | None = None

    @property
    def is_there(self) -> Tensor:
        """Whether a record has a side: `(N, 3)`."""
        return self.tokens > 0

    @property
    def means(self) -> Tensor:
        """The mean of log-probabilities of each side's tokens: `(N, 3)`."""
        return self.log_probs / self.tokens.clamp(min=1)

    @property
    def log_ratios(self) -> Tensor:
        """The logarithm of how much likelier each side is than to the reference: `(N, 3)`; 0 where there is none."""
        assert self.reference is not None
        return torch.where(self.is_there, self.log_probs - self.reference, 0)


def get_beta(options: PreferenceOptions) -> float:
    """Return `trainer.preference.beta`, or what it is by default."""
    return (2.0 if options.loss == "simpo" else 0.1) if options.beta is None else options.beta


def get_supervised_weight(options: PreferenceOptions) -> float:
    """Return `trainer.preference.supervised_weight`, or what it is by default."""
    return float(options.loss == "orpo") if options.supervised_weight is None else options.supervised_weight


def uses_reference(options: PreferenceOptions) -> bool:
    """Return whether a loss compares with a reference model."""
    return options.loss not in REFERENCE_FREE_LOSSES


def _difference(sides: SideScores) -> Tensor:
    """Return by how much the log-ratio of the chosen side exceeds that of the rejected one: `(N,)`."""
    return sides.log_ratios[:, CHOSEN] - sides.log_ratios[:, REJECTED]


def dpo(sides: SideScores, options: PreferenceOptions) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7), with smoothed labels."""
    return _smoothed(get_beta(options) * _difference(sides), options.label_smoothing)


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of the order of both sides, exchanged in a share of the pairs."""
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def robust(sides: SideScores, options: PreferenceOptions) -> Tensor:
    """DPO without the bias of labels that are exchanged (Chowdhury et al. 2024, arXiv:2403.00409)."""
    logits, smoothing = get_beta(options) * _difference(sides), options.label_smoothing
    losses = -(1 - smoothing) * logsigmoid(logits) + smoothing * logsigmoid(-logits)
    return losses / (1 - 2 * smoothing)


def ipo(sides: SideScores, options: PreferenceOptions) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, equation 17), of means over tokens."""
    means = sides.log_ratios / sides.tokens.clamp(min=1)
    return (means[:, CHOSEN] - means[:, REJECTED] - 1 / (2 * get_beta(options))).square()


def hinge(sides: SideScores, options: PreferenceOptions) -> Tensor:
    """The hinge loss of the margin of rewards (SLiC, Zhao et al. 2023, arXiv:2305.10425, with DPO's rewards)."""
    return (1 - get_beta(options) * _difference(sides)).relu()


def apo_zero(sides: SideScores, options: PreferenceOptions) -> Tensor:
    """Anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7)."""
    rewards = get_beta(options) * sides.log_ratios
    return 1 - rewards[:, CHOSEN].sigmoid() + rewards[:, REJECTED].sigmoid()


def simpo(sides: SideScores, options: PreferenceOptions) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, equation 6)."""
    rewards = get_beta(options) * sides.means
    return _smoothed(rewards[:, CHOSEN] - rewards[:, REJECTED] - options.simpo_gamma, options.label_smoothing)


def orpo(sides: SideScores, options: PreferenceOptions) -> Tensor:
    """The odds ratio's loss of ORPO (Hong et al. 2024, arXiv:2403.07691, equation 7), without the supervised one."""
    means = sides.means.clamp(max=-1e-6)  # a probability of 1 has no odds
    odds = means - torch.log1p(-means.exp())
    return -get_beta(options) * logsigmoid(odds[:, CHOSEN] - odds[:, REJECTED])


PAIR_LOSSES: dict[str, Callable[[SideScores, PreferenceOptions], Tensor]] = {
    "dpo": dpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "apo_zero": apo_zero,
    "simpo": simpo,
    "orpo": orpo,
}
"""`trainer.preference.loss` -> the loss of each pair, `(N,)`; `kto` is none of pairs."""


def kto(sides: SideScores, options: PreferenceOptions, divergence: Tensor) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306, equation 7): `(N, 2)`, 0 where a record has no such side.

    `divergence` is the estimate of the divergence of the model from its reference, see `estimate_divergence`.
    """
    rewards, zero = get_beta(options) * sides.log_ratios, get_beta(options) * divergence.clamp(min=0)
    wanted = options.desirable_weight * (1 - (rewards[:, CHOSEN] - zero).sigmoid())
    unwanted = options.undesirable_weight * (1 - (zero - rewards[:, REJECTED]).sigmoid())
    return torch.stack([wanted, unwanted], dim=1) * sides.is_there[:, :MISMATCHED]


def estimate_divergence(sides: SideScores) -> tuple[Tensor, Tensor]:
    """Return the sum and number of mismatched sides' log-ratios, whose mean estimates KTO's divergence; no gradient."""
    is_there = sides.is_there[:, MISMATCHED]
    return sides.log_ratios[:, MISMATCHED].detach().sum(), is_there.sum()


def needs_mismatches(options: PreferenceOptions) -> bool:
    """Return whether a loss is estimated with the replies of other records."""
    return options.loss == "kto"


def record_losses(sides: SideScores, options: PreferenceOptions, divergence: Tensor | None = None) -> Tensor:
    """Return the losses of records with their supervised term: `(N,)`; of `kto` the sum of those of its replies."""
    if options.loss == "kto":
        assert divergence is not None
        losses = kto(sides, options, divergence).sum(dim=1)
    else:
        losses = PAIR_LOSSES[options.loss](sides, options)
    if weight := get_supervised_weight(options):
        losses = losses - weight * sides.means[:, CHOSEN]
    return losses


def rewards(sides: SideScores, options: PreferenceOptions) -> Tensor:
    """Return the rewards that a loss compares, without gradient: `(N, 3)`; 0 where a record has no such side."""
    values = sides.log_ratios if uses_reference(options) else sides.means
    return get_beta(options) * values.detach()
