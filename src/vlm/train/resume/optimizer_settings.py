"""Applies accepted changes of learning rates and weight decays, which override those of the checkpoint."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Group = Mapping[str, Any]
"""A parameter group of an optimiser."""

SETTINGS = {
    "trainer.weight_decay.": ("weight_decay",),
    "trainer.adam_beta": ("betas",),
    "trainer.adam_epsilon": ("eps",),
}
"""Beginning of a key -> the settings of a parameter group that the key sets."""

SCHEDULE_KEYS = ("trainer.learning_rate.", "trainer.lr_scheduler", "trainer.warmup_steps")
"""Beginnings of the keys that the learning rate of a step depends on."""


def apply_settings(
    optimizer: Optimizer, scheduler: object, new_groups: Sequence[Group], changed_keys: Collection[str]
) -> None:
    """Apply changed settings to an optimiser and a schedule into which a checkpoint was loaded.

    Args:
        optimizer: the optimiser that the schedule drives.
        scheduler: the run's schedule, made from the configuration, with the state of the checkpoint.
        new_groups: the optimiser's groups from the configuration, before the checkpoint was loaded.
        changed_keys: the keys that differ from the checkpoint.

    Raises:
        ValueError: the learning rate was changed under a schedule that has no formula for a step.
    """
    for group, new in zip(optimizer.param_groups, new_groups, strict=True):
        for beginning, names in SETTINGS.items():
            if any(key.startswith(beginning) for key in changed_keys):
                group.update({name: new[name] for name in names if name in new})
    changed = [key for key in changed_keys if key.startswith(SCHEDULE_KEYS)]
    if not isinstance(scheduler, LambdaLR):
        if changed:
            raise ValueError(
                f"{changed[0]}: it cannot change in a run whose trainer.lr_scheduler_type depends on measured metrics; "
                "restore its earlier value"
            )
        return
    if any(key.startswith("trainer.learning_rate.") for key in changed_keys):
        scheduler.base_lrs = [new["lr"] for new in new_groups]
        for group, new in zip(optimizer.param_groups, new_groups, strict=True):
            group["initial_lr"] = new["lr"]
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
