"""Judges each step before its update: NaN or infinity in loss or gradient, and spikes; the same on all ranks.

It judges the norm of the gradient over all ranks, which clipping computes anyway. A loss that is not finite makes the
gradient NaN (`watch_loss`), so that one number, which every rank has, covers both.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vlm.config.schema import TrainerOptions
from vlm.data.dataset import SampleRef
from vlm.train.distributed import all_gather_objects, broadcast_from_rank0
from vlm.train.guards.errors import GuardStop
from vlm.train.guards.spikes import SpikeDetector

log = logging.getLogger(__name__)

GUARD_FILE = "guard.jsonl"
"""The file of the run directory that lists the steps that a guard found, with their samples."""
STATE_FILE = "guard.json"
"""The file of a checkpoint with the guard's state about earlier steps."""
GRADIENT, LOSS = "gradient norm", "loss"
STOP, SKIP, WARN = "stop", "skip", "warn"


@dataclass
class Step:
    """What this rank knows about the current step.

    Attributes:
        number: the number of its update, from 1.
        rows: the samples of each call of the model, in order.
        losses: the loss of each call, on the device.
        is_share: whether losses are summands of the step's loss, and not means of micro-batches.
    """

    number: int
    rows: list[list[SampleRef]]
    losses: list[Tensor]
    is_share: bool = False

    @property
    def next_refs(self) -> list[SampleRef]:
        """The samples of the model call whose loss comes next."""
        number = len(self.losses)
        return self.rows[number] if number < len(self.rows) else []

    def loss(self) -> Tensor:
        """Return the loss of the step on this rank, a scalar on the device."""
        losses = torch.stack(self.losses).float()
        return losses.sum() if self.is_share else losses.mean()


class StepGuard:
    """Decides for each step whether its update is applied, and ends the run if it must not continue.

    Args:
        options: `on_nonfinite`, `max_skipped_steps`, and the settings for spikes.
        folder: the run directory.
        is_writer: whether this rank writes files and messages.

    Attributes:
        skipped: number of skipped updates.
        skipped_in_a_row: number of skipped updates since the last applied one.
    """

    def __init__(self, options: TrainerOptions, folder: Path, *, is_writer: bool):
        self.options, self.folder, self.is_writer = options, folder, is_writer
        self.spikes = SpikeDetector(options.spike_window, options.spike_threshold)
        self.skipped = self.skipped_in_a_row = 0
        self.step = Step(0, [], [])

    @property
    def may_skip(self) -> bool:
        """Whether updates may be skipped."""
        return SKIP in (self.options.on_nonfinite, self.options.spike_action)

    @property
    def skips_spikes(self) -> bool:
        """Whether the update of a spike is skipped, so that a spike must be detected before the update."""
        return self.options.spike_action == SKIP

    # --- before the update ----------------------------------------------------------------------------------------

    def begin_step(self, number: int, rows: Sequence[Sequence[SampleRef]]) -> None:
        """Store the samples of a step, by call of the model, on this rank."""
        self.step = Step(number, [list(row) for row in rows], [])

    def watch_loss(self, loss: Tensor, *, is_share: bool) -> Tensor:
        """Return a loss unchanged or, if it is not finite, changed so that the gradient is NaN on every rank.

        A constant that is NaN would have no gradient. Nothing waits for the device.
        """
        detached = loss.detach()
        self.step.losses.append(detached)
        self.step.is_share = is_share
        return loss * torch.where(detached.isfinite(), 1.0, torch.nan).to(loss.dtype)

    def read_numbers(self, norm: Tensor | float) -> dict[str, float]:
        """Return the gradient norm of a step and, if spikes are detected, its loss over all ranks.

        All ranks get bitwise equal numbers, so that they find the same spikes. This waits for the device once.
        """
        if self.options.spike_action is None:
            return {GRADIENT: float(norm)}
        loss = self.step.loss()
        pair = torch.stack([torch.as_tensor(norm, dtype=torch.float32, device=loss.device), loss])
        if dist.is_initialized():
            dist.all_reduce(pair)
            pair /= dist.get_world_size()
        return dict(zip((GRADIENT, LOSS), pair.tolist(), strict=True))

    def judge(self, norm: Tensor | float) -> bool:
        """Return whether the update of a step is applied, given the gradient norm of all ranks; every rank calls this.

        Raises:
            GuardStop: the run ends here.
        """
        numbers = self.read_numbers(norm)
        if not math.isfinite(numbers[GRADIENT]):
            return self._leave_out(self.options.on_nonfinite, self._describe_nonfinite(numbers[GRADIENT]))
        spike = self.spikes.find(numbers) if self.options.spike_action is not None else None
        if spike is not None:
            return self._leave_out(str(self.options.spike_action), spike)
        self.skipped_in_a_row = 0
        return True

    def has_finite_losses(self) -> bool:
        """Return whether the losses of a step are finite on every rank; every rank must call this."""
        finite = torch.stack(self.step.losses).isfinite().all().float()
        if dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    # --- what is found --------------------------------------------------------------------------------------------

    def _describe_nonfinite(self, norm: float) -> str:
        if self.has_finite_losses():
            return f"the {GRADIENT} is {norm}, although the loss is finite"
        return "the loss is not finite (NaN or infinite)"

    def _leave_out(self, action: str, found: str) -> bool:
        """Handle a problem of a step as the options say; return whether its update is applied nevertheless."""
        self._write_step(action, found)
        where = f"Step {self.step.number}: {found}"
        listed = f"{self.folder / GUARD_FILE} lists its samples"
        if action == WARN:
            if self.is_writer:
                log.warning("%s. %s.", where, listed)
            return True
        if action == STOP:
            self.stop(
                f"{where}. Its update was not applied. {listed} on its last line. Checkpoints in "
                f"{self.folder} are of earlier steps, and their weights are finite. Lower the learning rate, train "
                "in bf16 or fp32 instead of fp16, or look at the samples; trainer.on_nonfinite=skip skips such steps."
            )
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.options.max_skipped_steps:
            self.stop(
                f"{where}. {self.skipped_in_a_row} updates in a row were skipped; allowed are "
                f"trainer.max_skipped_steps={self.options.max_skipped_steps}. {listed}. Lower the learning rate, or "
                "look at the samples."
            )
        if self.is_writer:
            log.warning("%s. Its update is skipped (%d so far). %s.", where, self.skipped, listed)
        return False

    def stop(self, message: str) -> None:
        """End the run on this rank; every rank calls it.

        Raises:
            GuardStop: always.
        """
        if self.is_writer:
            log.error("%s", message)
        raise GuardStop(message)

    def _write_step(self, action: str, found: str) -> None:
        """Add a step to `guard.jsonl`: its problem, and the samples and the loss of each call of the model."""
        calls = [
            {"loss": _json_number(float(loss)), "samples": [ref._asdict() for ref in refs]}
            for loss, refs in zip(self.step.losses, self.step.rows, strict=True)
        ]
        ranks = all_gather_objects(calls)
        if self.is_writer:
            line = {"step": self.step.number, "action": action, "found": found, "ranks": ranks}
            with (self.folder / GUARD_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line, ensure_ascii=False)}\n")

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save_to(self, checkpoint: Path) -> None:
        """Write the state about earlier steps, which is the same on every rank."""
        if self.is_writer:
            history = {name: list(values) for name, values in self.spikes.history.items()}
            state = {"history": history, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
            (checkpoint / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def load_from(self, checkpoint: Path) -> None:
        """Read the state on the rank that wrote it, for all ranks; a checkpoint of an earlier version has none."""
        file = checkpoint / STATE_FILE
        state = broadcast_from_rank0(json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)
        self.spikes = SpikeDetector(self.options.spike_window, self.options.spike_threshold)
        for name, values in state.get("history", {}).items():
            self.spikes.restore(name, values)


def _json_number(value: float) -> float | str:
    """Return a number for JSON; NaN and infinity become their names."""
    return value if math.isfinite(value) else str(value)
