"""The keys of `trainer.preference`: how a run trains on which of two replies is better. Imports no torch."""

from dataclasses import dataclass, field

from vlm.config.choices import PREFERENCE_LOSSES, REFERENCES, REJECTED_IMAGES
from vlm.config.rules import above, at_least, choices, share


@dataclass
class PreferenceOptions:
    """How a run with `trainer.objective=preference` trains; docs/preference.md has the formulas."""

    loss: str = field(default="dpo", metadata=choices(PREFERENCE_LOSSES))
    """`dpo`, `robust`, `ipo`, `hinge` and `apo_zero` compare both sides with a reference model; `simpo` and `orpo` have
    none; `kto` trains on single replies that are wanted or not."""
    beta: float | None = field(default=None, metadata=above(0))
    """How strongly the model is kept close to its reference; for `simpo` the scale of rewards, for `orpo` the weight of
    the odds ratio. null: 2 for `simpo`, 0.1 for the others."""
    label_smoothing: float = field(default=0.0, metadata=share(is_open_above=True))
    """For `dpo`, `simpo` and `robust`: the assumed share of pairs whose sides are swapped, below 0.5."""
    supervised_weight: float | None = field(default=None, metadata=at_least(0))
    """Weight of the supervised loss of the chosen reply (a mean over its tokens), added to the loss of each pair; null:
    1 for `orpo`, 0 for the others."""
    simpo_gamma: float = field(default=1.0, metadata=at_least(0))
    """For `simpo`: the target margin between the chosen and the rejected reward."""
    desirable_weight: float = field(default=1.0, metadata=above(0))
    """For `kto`: weight of wanted replies."""
    undesirable_weight: float = field(default=1.0, metadata=above(0))
    """For `kto`: weight of unwanted replies."""
    reference: str = field(default="auto", metadata=choices(REFERENCES))
    """How to compute log-probabilities of the reference model, which is the model at the start of the run: `cached`:
    one pass before the first step, kept in the cache; `adapter`: the model with its adapters disabled, in every step;
    `copy`: a frozen copy, in every step; `none`: for `simpo` and `orpo`. `auto`: `adapter` if only adapters train,
    otherwise `cached`."""
    rejected_image: str = field(default="same", metadata=choices(REJECTED_IMAGES))
    """Images of the rejected side: the `same` as the record's, `blank`, or `cropped` to a random part of at most a
    fifth of the area. With the last two, a record without a rejected reply prefers its reply with the true image."""
