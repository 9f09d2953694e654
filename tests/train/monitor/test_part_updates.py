"""The gradient norm and the update of each part, against what an optimiser of a known step does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerControl

from vlm.train.monitor.part_updates import PartUpdates, sample

RATE, CLIP = 0.1, 0.5


class Trained:
    """Two parts under SGD, with gradients of 1, clipped as `Trainer` does it."""

    def __init__(self):
        self.weights = {"connector": nn.Parameter(torch.ones(3, 4)), "head": nn.Parameter(torch.full((5,), 2.0))}
        parts = [SimpleNamespace(name=name, parameters={"weight": weight}) for name, weight in self.weights.items()]
        frozen = SimpleNamespace(name="language_model", parameters={"weight": nn.Parameter(torch.ones(2))})
        self.args: Any = SimpleNamespace(logging_strategy="steps", logging_first_step=False, device="cpu")
        self.state: Any = SimpleNamespace(global_step=0, logging_steps=2, max_steps=5)
        self.parts, self.last_norm = [*parts, frozen], None
        self.guarded_update, self.new_groups = SimpleNamespace(engine=None), []
        self.updates = PartUpdates(self)  # pyright: ignore[reportArgumentType]
        self.optimizer = torch.optim.SGD(self.weights.values(), lr=RATE)

    def step(self) -> dict[str, float]:
        """Take a step; what was measured of it."""
        for weight in self.weights.values():
            weight.grad = torch.ones_like(weight)
        self.last_norm = nn.utils.clip_grad_norm_(self.weights.values(), CLIP)
        self.updates.on_pre_optimizer_step(self.args, self.state, TrainerControl())
        self.optimizer.step()
        self.updates.on_optimizer_step(self.args, self.state, TrainerControl())
        self.optimizer.zero_grad()
        self.state.global_step += 1
        return self.updates.pop_metrics()


def test_norms_of_parts_are_those_before_clipping_and_updates_are_relative():
    trained = Trained()
    assert trained.step() == {}, "a step that is not logged"
    before = {name: float(weight.detach().norm()) for name, weight in trained.weights.items()}
    found = trained.step()
    assert found["grad_norm/connector"] == pytest.approx(12**0.5)
    assert found["grad_norm/head"] == pytest.approx(5**0.5)
    clipped = CLIP / 17**0.5
    for name, numel in (("connector", 12), ("head", 5)):
        assert found[f"update_norm/{name}"] == pytest.approx(RATE * clipped * numel**0.5 / before[name], rel=1e-4)
    assert len(found) == 4
    assert trained.step() == {}
    assert trained.step()
    assert trained.step(), "the last step is logged whatever its number"


def test_an_update_that_the_guard_left_out_has_no_size():
    trained = Trained()
    trained.state.global_step = 1
    trained.updates.on_pre_optimizer_step(trained.args, trained.state, TrainerControl())  # no gradients
    trained.updates.on_optimizer_step(trained.args, trained.state, TrainerControl())
    assert trained.updates.pop_metrics() == {}


def test_a_sample_of_a_large_tensor_estimates_its_size_from_all_its_columns():
    tensor = torch.zeros(256, 64)
    tensor[:, 7] = 3.0  # a stride that divides a row would miss it, or see nothing else
    found = sample([tensor], 1000)
    assert len(found) <= 1000
    assert float(found.norm()) == pytest.approx(float(tensor.norm()), rel=0.05)
    assert sample([tensor[:2]], 1000).tolist() == tensor[:2].flatten().tolist()
