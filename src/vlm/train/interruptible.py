"""A `Trainer` that may be stopped at any moment, and goes on from a checkpoint as if it had not been."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.data import DataLoader

from vlm.runs.status_line import SAVING
from vlm.train.guards.trainer import GuardedTrainer
from vlm.train.monitor.status import RunStatus
from vlm.train.resume.optimizer_settings import apply_settings
from vlm.train.stop_on_signal import EvaluationInterrupted, StopOnSignal


class InterruptibleTrainer(GuardedTrainer):
    """A trainer that saves and ends on signals, and does what was left when it goes on.

    Attributes:
        stop_on_signal: what a signal does.
        status: what the run does now.
        changed_keys: the keys with another value than at the checkpoint.
        new_groups: the optimiser's groups, without parameters, as the configuration makes them.
    """

    stop_on_signal: StopOnSignal
    status: RunStatus
    changed_keys: frozenset[str] = frozenset()
    new_groups: list[dict[str, object]]

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within, a signal during an evaluation saves a checkpoint; afterwards signals are as they were before."""
        try:
            yield
        except EvaluationInterrupted:
            self.stop_on_signal.is_evaluation_due = True
            self._save_checkpoint(self.model_wrapped, None)
            self.callback_handler.on_save(self.args, self.state, self.control)
            raise
        finally:
            self.stop_on_signal.close()

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        """As usual; no signal ends the process within."""
        with self.stop_on_signal.saving(), self.status.during(SAVING):
            super()._save_checkpoint(model, trial)

    def finish_saving(self) -> None:
        """As usual; no signal ends the process within."""
        with self.stop_on_signal.saving():
            super().finish_saving()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """As usual; what was changed since the checkpoint wins over what it brings."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None and self.changed_keys:
            apply_settings(self.lr_scheduler.optimizer, self.lr_scheduler, self.new_groups, self.changed_keys)
        return prepared

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        """As usual; `Trainer` would train one step more where a run is resumed that has come to its last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def end_epoch(self) -> None:
        """Evaluate, log and save as after the last step of an epoch."""
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model_wrapped, None, float(self.state.epoch or 0), None, time.time()
        )
