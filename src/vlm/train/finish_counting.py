"""The end of a count that goes on while a run trains: what waited for it is done, between two steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.data.counted_later import CountedLater
from vlm.train.monitor.speed import SpeedMeter
from vlm.train.stop_on_signal import StopOnSignal


class WaitingTrainer(Protocol):
    """What is asked of the run's `VLMTrainer`."""

    meter: SpeedMeter
    stop_on_signal: StopOnSignal

    def mark_progress(self) -> None:
        """Tell the watchdog that the run goes on."""
        ...


class FinishCounting(TrainerCallback):
    """Waits for the count before evaluations and behind the last step, and looks after every other step if it is done.

    Args:
        records: the samples that are counted.
        trainer: the run's; waiting is no part of its steps.
    """

    def __init__(self, records: CountedLater, trainer: WaitingTrainer):
        self.records, self.trainer = records, trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Wait where an evaluation comes first."""
        if args.eval_on_start:
            self.records.wait()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Wait where it has to be done now, or until a signal comes; a record that cannot be used is a ValueError."""
        is_needed = control.should_evaluate or state.global_step >= state.max_steps
        if self.records.is_counted or not (is_needed or self.records.is_due):
            return

        def goes_on() -> bool:
            """Return whether no signal has come."""
            self.trainer.mark_progress()
            return not self.trainer.stop_on_signal.agree(args.device)

        self.trainer.meter.stop(wait_for_device=True)
        self.records.wait(goes_on)
        if not self.records.is_counted:
            control.should_save, control.should_evaluate = True, False  # saving ends the run


@contextmanager
def counting(records: object) -> Iterator[None]:
    """Train within: afterwards the records are counted, or, where it fails, nothing counts them any more."""
    if not isinstance(records, CountedLater):
        yield
        return
    try:
        yield
        records.wait()
    finally:
        records.stop()
