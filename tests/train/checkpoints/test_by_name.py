"""Reading parameters one by one."""

import pytest
import torch

from vlm.train.checkpoints.by_name import SavedParameter, SavedParameters, set_states


def test_states_that_cannot_be_shared_out_are_refused():
    states = {"state1": torch.zeros(2, 3, dtype=torch.uint8), "step": torch.tensor(1.0)}
    saved = SavedParameters({"layer.weight": None}, lambda name: SavedParameter(torch.zeros(2, 3), states))
    assert "other" not in saved
    with pytest.raises(ValueError, match=r"its state state1 of layer.weight is \(2, 3\) torch.uint8"):
        _ = saved["layer.weight"]


def test_each_parameter_counts_its_own_steps():
    """A step that is shared by several would be counted several times."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    step = torch.tensor(3.0)
    state = {"step": step, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    set_states(optimizer, dict.fromkeys(parameters, state))
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in parameters] == [4.0, 4.0]
    assert float(step) == 3.0
