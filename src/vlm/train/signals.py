"""How a run is ended from outside: by SIGTERM, which clusters send before they take a machine back."""

import atexit
import logging
import multiprocessing
import multiprocessing.util  # its own work at the end is registered first, so it comes behind ours
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""With what a run ends that was asked to."""


class SigtermCheckpoint(TrainerCallback):
    """SIGTERM ends a run behind the step that it is at, with a checkpoint to go on from.

    It may come several times, from whoever sends it and from a launcher that hands it on. Ranks get it at different
    steps, or only one of them does: they agree behind each step.

    Args:
        can_save: whether there is a checkpoint to be left.
    """

    def __init__(self, *, can_save: bool = True):
        self.can_save = can_save
        self.received = self.any_rank_received = self.handler_installed = False
        self.previous_handler: Any = signal.SIG_DFL

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Listen; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self.previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
            self.handler_installed = True

    def _on_sigterm(self, number: int, frame: Any) -> None:
        """Take note."""
        self.received = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Ask for a checkpoint where any rank was asked to end."""
        self.any_rank_received = self._any_rank_received_sigterm(args.device)
        if not self.any_rank_received:
            return control
        if not self.can_save:
            self._end("was asked to end, and there is nothing to go on from")
        control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any):
        """End, now that the checkpoint is complete."""
        if self.any_rank_received:
            self._end(
                f"was asked to end and saved checkpoint-{state.global_step}; the same command with "
                f"trainer.output_dir={args.output_dir} trainer.resume_from_checkpoint=true goes on"
            )

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any):
        """Listen no more."""
        self.restore()

    def _any_rank_received_sigterm(self, device: torch.device) -> bool:
        if not dist.is_initialized():
            return self.received
        received_flag = torch.tensor([int(self.received)], device=device)
        dist.all_reduce(received_flag, op=dist.ReduceOp.MAX)
        return bool(received_flag.item())

    def _end(self, message: str) -> None:
        self.restore()
        log.info("The run %s", message)
        raise SystemExit(SIGTERM_EXIT_CODE)

    def restore(self) -> None:
        """Listen no more, whether the run is over or has failed."""
        if self.handler_installed:
            self.handler_installed = False
            signal.signal(signal.SIGTERM, self.previous_handler)


@atexit.register
def _kill_workers() -> None:
    """End data workers that are still there, as after an error: Python would ask them by SIGTERM, and wait."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def ignore_sigterm_in_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Let a signal to all processes of a run leave a loader's workers to their process, with which they end."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper makes its workers by another one
    inner.worker_init_fn = partial(ignore_sigterm, inner.worker_init_fn)
    return loader


def ignore_sigterm(init_fn: Callable[[int], None] | None, worker: int) -> None:
    """Begin a data worker: PyTorch lets it die of the signal, and its process of that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init_fn is not None:
        init_fn(worker)
