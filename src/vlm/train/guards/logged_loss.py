"""The training loss that is logged: a mean over the steps whose update was applied."""

from collections.abc import Mapping

import torch
from torch import Tensor

COUNTS = ("steps", "skipped", "all_steps", "all_skipped")
"""Counters of steps, since the last log and of the run, and of those whose update was left out."""


class LoggedLoss:
    """Takes the losses of updates that were left out of what `Trainer` adds up between two logs."""

    def __init__(self):
        self.before = torch.tensor(0.0)
        self.steps = self.skipped = 0
        self.all_steps = self.all_skipped = 0

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of steps that were counted, which go with the sums of losses in a checkpoint."""
        return {name: getattr(self, name) for name in COUNTS}

    @counts.setter
    def counts(self, counts: Mapping[str, int]) -> None:
        """Take the numbers over from a checkpoint; one that is not there is 0."""
        for name in COUNTS:
            setattr(self, name, counts.get(name, 0))

    def begin_step(self, total: Tensor) -> None:
        """Remember the sum of losses, a scalar, before a step adds its own; the device is not waited for."""
        self.before = total.clone()

    def end_step(self, total: Tensor, *, skipped: bool) -> None:
        """Count a step; where its update is left out, set the sum back."""
        self.steps += 1
        if skipped:
            self.skipped += 1
            total.copy_(self.before)

    def correct(self, logs: dict[str, float]) -> None:
        """Let `loss`, a mean over the steps since the last log, be one over those that count; none without any."""
        if self.steps and self.skipped == self.steps:
            del logs["loss"]
        elif self.skipped:
            logs["loss"] *= self.steps / (self.steps - self.skipped)
        self.all_steps += self.steps
        self.all_skipped += self.skipped
        self.steps = self.skipped = 0

    def correct_total(self, logs: dict[str, float]) -> None:
        """Let `train_loss` be the mean over the steps of a call that count; none without any."""
        steps, skipped = self.all_steps + self.steps, self.all_skipped + self.skipped
        if steps and skipped == steps:
            logs.pop("train_loss", None)
        elif skipped:
            logs["train_loss"] *= steps / (steps - skipped)
