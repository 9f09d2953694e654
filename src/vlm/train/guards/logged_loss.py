"""The training loss that is logged: a mean over the steps whose update was applied."""

import torch
from torch import Tensor


class LoggedLoss:
    """Takes the losses of updates that were left out of what `Trainer` adds up between two logs."""

    def __init__(self):
        self.before = torch.tensor(0.0)
        self.steps = self.skipped = 0
        self.all_steps = self.all_skipped = 0

    @property
    def counts(self) -> list[int]:
        """The steps since the last log, those of them that were left out, and both before that log."""
        return [self.steps, self.skipped, self.all_steps, self.all_skipped]

    @counts.setter
    def counts(self, counts: list[int]) -> None:
        self.steps, self.skipped, self.all_steps, self.all_skipped = counts

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
