"""Checkpoints under FSDP2: any number of ranks reads them, and what cannot be sharded is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train.checkpoints.conftest import Differences
from vlm.train.checkpoints.sharded import (
    load_sharded,
    open_sharded,
    own_files,
    save_sharded,
    save_sharded_in_background,
    saved_names,
)


def test_fsdp2_goes_on_in_every_world(differences: Differences):
    pairs = {pair: value for pair, value in differences.items() if pair[0].endswith("fsdp2")}
    assert {("2-fsdp2", "2-fsdp2"), ("2-fsdp2", "1-alone"), ("2-fsdp2", "1-zero3")} <= pairs.keys()
    assert {pair: value for pair, value in pairs.items() if value > 1e-6} == {}


def test_a_checkpoint_is_read_by_name_and_as_a_whole(tmp_path: Path):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = dict(layer.named_parameters())
    save_sharded(tmp_path, tensors, optimizer)
    assert saved_names(tmp_path) == {"weight", "bias"}
    saved = open_sharded(tmp_path)["weight"]
    assert torch.equal(saved.weight, layer.weight)
    assert saved.states.keys() == {"exp_avg", "exp_avg_sq", "step"}

    other = nn.Linear(3, 2)
    fresh = torch.optim.AdamW(other.parameters())
    load_sharded(tmp_path, dict(other.named_parameters()), fresh)
    assert torch.equal(other.bias, layer.bias)
    assert torch.equal(fresh.state[other.weight]["exp_avg_sq"], optimizer.state[layer.weight]["exp_avg_sq"])
    assert fresh.state[other.bias]["step"] == 1


def test_states_of_other_shapes_are_refused(tmp_path: Path):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    optimizer.state[layer.weight]["row"] = torch.zeros(2)
    with pytest.raises(ValueError, match="the state row of weight has the shape"):
        save_sharded(tmp_path, dict(layer.named_parameters()), optimizer)


def test_what_is_written_in_the_background_is_what_was_there_when_it_began(tmp_path: Path):
    layer = nn.Linear(3, 2)
    tensors = dict(layer.named_parameters())
    before = layer.weight.detach().clone()
    wait = save_sharded_in_background(tmp_path, tensors, torch.optim.SGD(layer.parameters()), None)
    with torch.no_grad():
        layer.weight.fill_(7)
    wait()
    assert torch.equal(open_sharded(tmp_path)["weight"].weight, before)
    assert [path.suffix for path in tmp_path.glob(own_files(0))] == [".distcp"]
