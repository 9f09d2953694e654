"""Which updates are judged in float16: those that the search for the loss scale leaves out are no fault."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType

from vlm.train.guards.errors import GuardStop
from vlm.train.guards.step_guard import StepGuard
from vlm.train.guards.update import GuardedUpdate


def make_update(folder: Path, scale: float, loss: float, *, deepspeed: bool, dynamic: bool = True) -> GuardedUpdate:
    options: Any = SimpleNamespace(
        on_nonfinite="stop", max_skipped_steps=10, spike_action=None, spike_window=10, spike_threshold=10.0
    )
    guard = StepGuard(options, folder, is_writer=True)
    guard.begin_step(1, [[]])
    guard.watch_loss(torch.tensor(loss, requires_grad=True), is_share=False)
    engine = SimpleNamespace(
        fp16_enabled=lambda: True, dynamic_loss_scale=lambda: dynamic, optimizer=SimpleNamespace(loss_scale=scale),
        was_step_applied=lambda: False,
    )  # fmt: skip
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED if deepspeed else DistributedType.NO,
        deepspeed_engine_wrapped=SimpleNamespace(engine=engine),
        scaler=None if deepspeed else SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale),
    )
    return GuardedUpdate(guard, accelerator)


@pytest.mark.parametrize("deepspeed", [False, True])
def test_a_scale_that_is_too_high_is_no_fault(tmp_path: Path, deepspeed: bool):
    update = make_update(tmp_path, 1024.0, 2.0, deepspeed=deepspeed)
    assert not update.finish(torch.nn.Linear(1, 1), math.inf)
    assert update.guard.skipped == 0
    assert not (tmp_path / "guard.jsonl").exists()


@pytest.mark.parametrize(
    ("scale", "loss", "dynamic"), [(1.0, 2.0, True), (1024.0, math.nan, True), (128.0, 2.0, False)]
)
def test_what_no_lower_scale_would_help_is_one(tmp_path: Path, scale: float, loss: float, dynamic: bool):
    """The least scale, a loss that is not finite itself, a scale that stays as it is."""
    with pytest.raises(GuardStop):
        make_update(tmp_path, scale, loss, deepspeed=True, dynamic=dynamic).finish(torch.nn.Linear(1, 1), math.inf)


@pytest.mark.parametrize(("norm", "stops"), [(math.nan, True), (2.0, False)])
def test_the_schedule_stands_still_where_the_scaler_leaves_an_update_out(tmp_path: Path, norm: float, stops: bool):
    """Not where a spike is: the optimiser is called then, without gradients."""
    assert make_update(tmp_path, 1024.0, 2.0, deepspeed=False).stops_schedule(norm) is stops
