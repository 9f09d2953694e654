"""The contrastive loss: as its formula says, without false negatives, and on two ranks as on one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlm.models.configuration_prediction import HeadSettings
from vlm.models.contrastive import NEGATIVE, POSITIVE, QUERY, LogitScale, contrastive, gather_step, shorten_vectors
from vlm.models.head_losses import head_loss
from vlm.models.heads import PredictionHead

DIM = 6


def batch(queries: int, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, roles and keys of so many pairs and hard negatives, all of other contents."""
    roles = [QUERY] * queries + [POSITIVE] * queries + [NEGATIVE] * negatives
    vectors = F.normalize(torch.randn(len(roles), DIM), dim=1)
    return vectors, torch.tensor(roles)[:, None].float(), torch.arange(len(roles))


def test_the_loss_is_that_of_the_formula():
    vectors, roles, keys = batch(4, 3)
    logits = vectors[:4] @ vectors[4:].T / 0.1
    there = F.cross_entropy(logits, torch.arange(4))
    back = F.cross_entropy(vectors[4:8] @ vectors[:4].T / 0.1, torch.arange(4))
    assert torch.allclose(contrastive(vectors, roles, keys, temperature=0.1, symmetric=False), there)
    assert torch.allclose(contrastive(vectors, roles, keys, temperature=0.1), (there + back) / 2)
    named = head_loss("embedding", "infonce", vectors, roles, groups=keys, options={"temperature": 0.1})
    assert torch.equal(named, contrastive(vectors, roles, keys, temperature=0.1))


def test_widths_are_summed_by_their_weights():
    vectors, roles, keys = batch(4, 3)
    found = contrastive(vectors, roles, keys, widths=[2, DIM], width_weights=[0.5, 2.0])
    short = contrastive(shorten_vectors(vectors, 2), roles, keys)
    assert torch.allclose(found, 0.5 * short + 2 * contrastive(vectors, roles, keys))


@pytest.mark.parametrize("kind", ["positive", "query", "own query"])
def test_equal_contents_are_no_negatives(kind: str):
    """The second record has the first one's positive, or its query, or a document that is the first one's query."""
    vectors, roles, keys = batch(3, 0)
    place = {"positive": 4, "query": 1, "own query": 4}[kind]
    keys[place] = keys[3 if kind == "positive" else 0]
    allowed = torch.ones(3, 3, dtype=torch.bool)
    allowed[0, 1] = False
    if kind != "own query":
        allowed[1, 0] = False
    logits = (vectors[:3] @ vectors[3:].T / 0.05).masked_fill(~allowed, -torch.inf)
    found = contrastive(vectors, roles, keys, symmetric=False)
    assert torch.allclose(found, F.cross_entropy(logits, torch.arange(3)))


def test_rows_without_a_record_do_not_count():
    vectors, roles, keys = batch(2, 0)
    more = torch.cat([vectors, torch.randn(1, DIM)])
    found = contrastive(more, torch.cat([roles, torch.tensor([[torch.nan]])]), torch.cat([keys, torch.tensor([-1])]))
    assert torch.allclose(found, contrastive(vectors, roles, keys))
    nothing = torch.randn(1, DIM, requires_grad=True)
    contrastive(nothing, torch.tensor([[torch.nan]]), torch.tensor([-1])).backward()
    assert nothing.grad is not None
    assert not nothing.grad.any()


def test_a_temperature_is_learned_or_stays():
    fixed, learned = LogitScale(0.07, learned=False), LogitScale(0.07, learned=True)
    assert [scale().item() for scale in (fixed, learned)] == pytest.approx([0.07, 0.07])
    assert not list(fixed.parameters())
    assert fixed.state_dict().keys() == learned.state_dict().keys(), "either trains on the other's checkpoint"
    torch.nn.init.constant_(learned.log_temperature, math.log(1e-4))
    assert learned().item() == pytest.approx(0.01)
    settings = HeadSettings("v", "embedding", type="identity", loss_options={"learned_temperature": True})
    head = PredictionHead(DIM, settings)
    vectors, roles, keys = batch(3, 1)
    head_loss("embedding", "infonce", vectors, roles, groups=keys, options=head.loss_options()).backward()
    assert head.temperature is not None
    assert head.temperature.log_temperature.grad is not None


def shares(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a rank, of different numbers: made of the joint batch, whose rows stand by role."""
    torch.manual_seed(3)
    features, roles, keys = (
        torch.randn(14, 4),
        torch.tensor([0] * 5 + [1] * 5 + [2] * 4)[:, None].float(),
        torch.arange(14),
    )
    keys[8] = keys[5]
    first = [0, 1, 2, 5, 6, 7, 10]
    own = first if rank == 0 else [row for row in range(14) if row not in first]
    return features[own], roles[own], keys[own]


OPTIONS: dict[str, Any] = {"temperature": 0.2, "widths": [3, DIM]}


def step(layer: torch.nn.Linear, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    features, roles, keys = rows
    loss = contrastive(F.normalize(layer(features), dim=1), roles, keys, **OPTIONS)
    loss.backward()
    return loss.detach()


def make_layer() -> torch.nn.Linear:
    torch.manual_seed(5)
    return torch.nn.Linear(4, DIM)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layer = make_layer()
    loss = step(layer, shares(rank))
    values = [loss, layer.weight.grad, layer.bias.grad]
    for value in values:
        assert value is not None
        dist.all_reduce(value)
        value /= 2  # as data-parallel training averages
    gathered = gather_step(torch.ones(1, 1), torch.tensor([rank]), torch.tensor([rank]))
    assert gathered.roles.tolist() == [0, 1]
    torch.save(values, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_the_gradient_of_one_with_the_joint_batch(tmp_path: Path):
    torch.multiprocessing.start_processes(run_rank, (str(tmp_path),), 2, start_method="fork")
    layer = make_layer()
    joint = [torch.cat(parts) for parts in zip(shares(0), shares(1), strict=True)]
    order = joint[1][:, 0].argsort(stable=True)
    loss = step(layer, (joint[0][order], joint[1][order], joint[2][order]))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for value, expected in zip(found, (loss, layer.weight.grad, layer.bias.grad), strict=True):
            torch.testing.assert_close(value, expected)
