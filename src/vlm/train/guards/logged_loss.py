"""The logged training loss: a mean over the steps whose update was applied."""

from collections.abc import Mapping

import torch
from torch import Tensor

COUNTS = ("steps", "skipped", "all_steps", "all_skipped")
"""Counters of steps and of skipped steps, since the last log and in the whole run."""


class LoggedLoss:
    """Removes the losses of skipped updates from the sum that `Trainer` keeps between two logs."""

    def __init__(self):
        self.before = torch.tensor(0.0)
        self.steps = self.skipped = 0
        self.all_steps = self.all_skipped = 0

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of counted steps, which a checkpoint saves with the sums of losses."""
        return {name: getattr(self, name) for name in COUNTS}

    @counts.setter
    def counts(self, counts: Mapping[str, int]) -> None:
        """Restore the numbers from a checkpoint; missing ones are 0."""
        for name in COUNTS:
            setattr(self, name, counts.get(name, 0))

    def begin_step(self, total: Tensor) -> None:
        """Remember the sum of losses, a scalar, before a step adds its own, without waiting for the device."""
        self.before = total.clone()

    def end_step(self, total: Tensor, *, skipped: bool) -> None:
        """Count a step; if its update was skipped, restore the sum."""
        self.steps += 1
        if skipped:
            self.skipped += 1
            total.copy_(self.before)

    def correct(self, logs: dict[str, float]) -> None:
        """Turn `loss`, a mean over all steps since the last log, into one over applied steps; drop it without any."""
        if self.steps and self.skipped == self.steps:
            del logs["loss"]
        elif self.skipped:
            logs["loss"] *= self.steps / (self.steps - self.skipped)
        self.all_steps += self.steps
        self.all_skipped += self.skipped
        self.steps = self.skipped = 0

    def correct_total(self, logs: dict[str, float]) -> None:
        """Turn `train_loss` into the mean over applied steps of a call; drop it without any."""
        steps, skipped = self.all_steps + self.steps, self.all_skipped + self.skipped
        if steps and skipped == steps:
            logs.pop("train_loss", None)
        elif skipped:
            logs["train_loss"] *= steps / (steps - skipped)
