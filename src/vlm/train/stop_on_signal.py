"""What a trainer does on a signal: all ranks agree, save a checkpoint, and end."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from signal import Signals
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlm.clusters.processes import SAVED_EXIT_CODE
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.signals import Phase, SignalListener, current_listener

log = logging.getLogger(__name__)


EVALUATION_DUE = "evaluation_due"
"""The file that says of a checkpoint that a signal interrupted the evaluation after its step."""


class EvaluationInterrupted(Exception):
    """A signal came during an evaluation; every rank raises it at the same batch."""


class StopOnSignal(TrainerCallback):
    """Ends a run after the current step, with a checkpoint, where any rank got a signal.

    Ranks get a signal at different steps, or only one of them does, so they agree after each step and each checkpoint.
    Without `can_save`, the run ends without a checkpoint. A process without a listener has one while it trains.

    An evaluation is not waited for: it is interrupted, and made when the run is resumed; it is saved with the
    checkpoint (`SavedWithCheckpoint`) that it is due.

    `finish_saving` is called before the run ends: a checkpoint may still be written in the background.
    """

    def __init__(self, *, can_save: bool = True):
        self.can_save = can_save
        self.finish_saving: Callable[[], None] = lambda: None
        self.agreed: Signals | None = None
        self.is_evaluation_due = False
        self.listener = current_listener()
        self.own_listener = ExitStack()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """From now on a signal waits for the end of a step."""
        if self.listener is None:
            self.listener = SignalListener(Phase.TRAINING, owns_process=False)
            if threading.current_thread() is threading.main_thread():  # no other thread can install handlers
                self.own_listener.enter_context(self.listener)
        self.listener.enter_phase(Phase.TRAINING)

    def saving(self) -> AbstractContextManager[object]:
        """Return a context within which no signal ends the process."""
        return nullcontext() if self.listener is None else self.listener.saving()

    def agree(self, device: torch.device) -> bool:
        """Return whether any rank got a signal; every rank makes the same calls."""
        assert self.listener is not None
        number = int(self.listener.received or 0)
        if dist.is_initialized():
            flag = torch.tensor([number], device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            number = int(flag.item())
        self.agreed = Signals(number) if number else None
        return self.agreed is not None

    def interrupt_evaluation(self, device: torch.device) -> None:
        """Raise EvaluationInterrupted where any rank got a signal while the run trains; every rank calls it."""
        listener = self.listener
        if self.can_save and listener is not None and listener.phase is Phase.TRAINING and self.agree(device):
            raise EvaluationInterrupted

    def save_to(self, checkpoint: Path) -> None:
        """Save that an evaluation is due."""
        if self.is_evaluation_due and (not dist.is_initialized() or dist.get_rank() == 0):
            checkpoint.joinpath(EVALUATION_DUE).touch()

    def load_from(self, checkpoint: Path) -> None:
        """Read whether an evaluation is due."""
        self.is_evaluation_due = broadcast_from_rank0(checkpoint.joinpath(EVALUATION_DUE).exists())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Ask for a checkpoint where any rank got a signal."""
        if self.agree(args.device):
            if not self.can_save:
                self._end(SAVED_EXIT_CODE, "folds have no checkpoints: the same command starts with the first fold")
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """End the run, now that the checkpoint is complete; a signal may have come while it was written."""
        if not self.agree(args.device):
            return
        self.finish_saving()
        checkpoint = Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if broadcast_from_rank0(checkpoint.is_dir()):
            command = f"the same command with trainer.output_dir={args.output_dir} resumes"
            self._end(SAVED_EXIT_CODE, f"saved {checkpoint.name}; {command}")
        self._end(128 + (self.agreed or 0), f"{checkpoint} could not be written")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """All steps are done; a fold leaves nothing that a signal could save."""
        assert self.listener is not None
        self.listener.enter_phase(Phase.END if self.can_save else Phase.START)
        self.close()

    def _end(self, code: int, result: str) -> NoReturn:
        assert self.agreed is not None
        log.info("The run ends because of %s: %s. Exit code %d.", self.agreed.name, result, code)
        raise SystemExit(code)

    def close(self) -> None:
        """Stop listening where this trainer began it, whether the run has ended or failed."""
        self.own_listener.close()


class EvaluatingTrainer(Protocol):
    """What is asked of the run's `VLMTrainer`."""

    stop_on_signal: StopOnSignal
    model_wrapped: object
    control: TrainerControl

    _maybe_log_save_evaluate: Callable[..., None]


class EvaluateWhenDue(TrainerCallback):
    """Makes the evaluation that a signal interrupted, before the first step of the resumed run."""

    def __init__(self, trainer: EvaluatingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Evaluate, as the interrupted run would have after the step of the checkpoint."""
        trainer = self.trainer
        if trainer.stop_on_signal.is_evaluation_due:
            trainer.stop_on_signal.is_evaluation_due = False
            asked = trainer.control  # as it was when the checkpoint was saved
            asked.should_log, asked.should_save, asked.should_evaluate = False, False, True
            no_loss, epoch = torch.tensor(0.0), state.epoch or 0.0
            trainer._maybe_log_save_evaluate(no_loss, None, trainer.model_wrapped, None, epoch, None, time.time())
            trainer.control.should_evaluate = False
