"""SIGTERM, which clusters send before they take a machine back: the run saves a checkpoint and ends."""

import atexit
import logging
import multiprocessing
import multiprocessing.util  # registers its own exit function first, which then runs after ours
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import FrameType

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""The exit code of a run that SIGTERM ended."""


class SigtermCheckpoint(TrainerCallback):
    """Ends a run on SIGTERM after the current step, with a checkpoint to resume from.

    The signal may come several times, from its sender and from a launcher that passes it on. Ranks get it at different
    steps, or only one of them does, so they agree after each step. Without `can_save`, it ends without one.
    """

    def __init__(self, *, can_save: bool = True):
        self.can_save = can_save
        self.received = self.any_rank_received = False
        self.handlers = ExitStack()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Install the handler; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGTERM, self._on_sigterm)
            self.handlers.callback(signal.signal, signal.SIGTERM, previous)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Ask for a checkpoint where any rank got the signal."""
        received = self.received
        if dist.is_initialized():
            flag = torch.tensor([int(received)], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            received = bool(flag.item())
        if received:
            if not self.can_save:
                self._end("was asked to end, and there is nothing to go on from")
            self.any_rank_received = control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """End the run, now that the checkpoint is complete."""
        if self.any_rank_received:
            self._end(
                f"was asked to end and saved checkpoint-{state.global_step}; the same command with "
                f"trainer.output_dir={args.output_dir} goes on"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Restore the earlier handler."""
        self.restore()

    def _end(self, message: str) -> None:
        self.restore()
        log.info("The run %s", message)
        raise SystemExit(SIGTERM_EXIT_CODE)

    def restore(self) -> None:
        """Restore the earlier handler, whether the run has ended or failed."""
        self.handlers.close()


@atexit.register
def _kill_workers() -> None:
    """Kill data workers that are left after an error: Python would send them SIGTERM, which they ignore, and wait."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def ignore_sigterm_in_workers(loader: DataLoader) -> DataLoader:
    """Return a loader whose workers ignore a SIGTERM to all processes of a run; they end with their own process."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper starts the workers of this one
    inner.worker_init_fn = partial(ignore_sigterm, inner.worker_init_fn)
    return loader


def ignore_sigterm(init_fn: Callable[[int], None] | None, worker: int) -> None:
    """Start a data worker that ignores SIGTERM: PyTorch would let it die, and its process with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init_fn is not None:
        init_fn(worker)
