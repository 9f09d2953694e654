"""A `Trainer` with guards: each update is judged, only finite weights are saved, and no run hangs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlm.config.choices import PLATEAU_SCHEDULES
from vlm.config.schema import RunConfig
from vlm.train.checkpoints.trained import trained_tensors
from vlm.train.checkpoints.trainer import CheckpointTrainer
from vlm.train.guards.errors import GuardStop, explain_worker_death
from vlm.train.guards.logged_loss import LoggedLoss
from vlm.train.guards.memory import explain_out_of_memory
from vlm.train.guards.step_guard import StepGuard
from vlm.train.guards.update import GuardedUpdate
from vlm.train.guards.watchdog import Watchdog, WatchdogCallback
from vlm.train.guards.weights import describe_nonfinite, find_nonfinite


class GuardedTrainer(CheckpointTrainer):
    """A trainer with guards for updates, weights, workers, memory and progress, as the `trainer` keys say.

    A subclass calls `set_up_guards` when it is made, lets `guard` see the samples of each step and each loss, and
    trains `within_guards`.

    Attributes:
        guard: judges steps.
        logged_loss: keeps skipped steps out of the logged loss.
        watchdog: ends a run that is stuck; None: no watchdog.
        last_norm: the norm of the last step's gradient, before it was clipped.
    """

    guard: StepGuard
    guarded_update: GuardedUpdate
    logged_loss: LoggedLoss
    watchdog: Watchdog | None
    last_norm: Tensor | float | None = None

    def set_up_guards(self, config: RunConfig) -> None:
        """Make the guards of a run."""
        self.guarded_config, options, args = config, config.trainer, self.args
        folder = Path(str(args.output_dir))
        self.guard = StepGuard(options, folder, is_writer=args.process_index == 0)
        self.guarded_update = GuardedUpdate(self.guard, self.accelerator)
        self.logged_loss, self.watchdog = LoggedLoss(), None
        if options.stuck_after is not None:
            self.watchdog = Watchdog(folder, options.stuck_after, args.process_index, args.world_size)
            self.add_callback(WatchdogCallback(self.watchdog))

    @contextmanager
    def within_guards(self) -> Iterator[None]:
        """Context that explains a lack of memory and dead data workers, and stops the watchdog at its end."""
        with explain_worker_death(self.guarded_config), explain_out_of_memory(self, self.guarded_config):
            try:
                yield
            except GuardStop:  # on every rank
                self.finish_saving()
                raise
            finally:
                if self.watchdog is not None:
                    self.watchdog.stop()

    def mark_progress(self) -> None:
        """Tell the watchdog that the run has made progress."""
        if self.watchdog is not None:
            self.watchdog.mark()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """As usual; from now on the guard judges updates."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.guarded_update.prepare()
        return prepared

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """As usual; the guard uses the norm to decide whether the update is applied."""
        norm = self.last_norm = super()._get_grad_norm(model, grad_norm)
        skipped = self.guard.skipped
        self.guarded_update.finish(model, norm)
        is_skipped = self.guard.skipped > skipped
        self.logged_loss.end_step(self._tr_loss, skipped=is_skipped)
        follows_metric = self.args.lr_scheduler_type in PLATEAU_SCHEDULES
        if is_skipped and self.guarded_update.stops_schedule(norm) and not follows_metric:
            self.lr_scheduler.step()  # the rate depends on the step's number alone
        return norm

    def correct_logs(self, logs: dict[str, float]) -> None:
        """Make the logged training loss that of applied updates, and add the number of skipped ones."""
        if "loss" in logs:
            self.logged_loss.correct(logs)
            if self.guard.may_skip:
                logs["skipped_steps"] = self.guard.skipped
        elif "train_loss" in logs:
            self.logged_loss.correct_total(logs)

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        """As usual, of finite weights."""
        self._check_finite_weights(f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def save_whole_model(self, folder: Path, write_more: Callable[[Path], object] | None = None) -> None:
        """As usual, of finite weights."""
        self._check_finite_weights(str(folder))
        super().save_whole_model(folder, write_more)

    def _check_finite_weights(self, what: str) -> None:
        if names := find_nonfinite(trained_tensors(self.model, self.parts).items()):
            self.guard.stop(describe_nonfinite(names, what))
