"""Losses of prediction heads against formulas of others, or written out naively in double precision."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss
from torch import Tensor

from vlm.models.head_losses import LOSSES, focal, head_loss, margin_ranking
from vlm.models.head_tasks import NUM_OUTPUTS_BY_TASK
from vlm.models.heads import OrdinalThresholds

ROWS, LABELS = 12, 4
NUMBERS = {"binary": 2, "multiclass": LABELS, "multilabel": LABELS, "regression": 0, "ordinal": LABELS, "pairwise": 0}
WEIGHTS = {"binary": [0.5, 3.0], "multiclass": [1.0, 2.0, 0.25, 4.0], "multilabel": [1.0, 2.0, 0.25, 4.0],
           "ordinal": [1.0, 2.0, 0.25, 4.0]}  # fmt: skip
ALL = [(task, loss) for task, losses in LOSSES.items() for loss in losses] + [("pairwise", "margin")]


def draw_outputs(task: str) -> tuple[Tensor, Tensor]:
    """Numbers of a head and targets of `ROWS` rows."""
    outputs = 2 * torch.randn(ROWS, NUM_OUTPUTS_BY_TASK[task](NUMBERS[task]))
    if task == "ordinal":
        outputs = outputs.sort(dim=1, descending=True).values
    targets = {
        "binary": torch.randint(2, (ROWS, 1)),
        "multilabel": torch.randint(2, (ROWS, LABELS)),
        "regression": torch.randn(ROWS, 1),
        "pairwise": torch.randint(3, (ROWS, 1)),
    }.get(task, torch.arange(ROWS)[:, None] % LABELS)
    return outputs, targets.float()


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number)) if number >= 0 else 1 - 1 / (1 + math.exp(number))


def chances(task: str, row: list[float]) -> list[float]:
    """The probability of each label of a row, or of its yes."""
    if task == "multiclass":
        powers = [math.exp(one) for one in row]
        return [one / sum(powers) for one in powers]
    if task == "ordinal":
        edges = [1.0, *map(sigmoid, row), 0.0]
        return [edges[place] - edges[place + 1] for place in range(len(edges) - 1)]
    return [sigmoid(one) for one in row]


def naive(
    task: str, outputs: Tensor, targets: Tensor, weights: list[float] | None = None, smoothing: float = 0.0,
    gamma: float = 0.0,
) -> float:  # fmt: skip
    """Cross-entropy, perhaps weighted, smoothed or focal, row by row in Python's own numbers."""
    rows = []
    for row, target in zip(outputs.double().tolist(), targets.tolist(), strict=True):
        found = chances(task, row)
        if task in ("multiclass", "ordinal"):
            right = int(target[0])
            spread = [(1 - smoothing) * (label == right) + smoothing / len(found) for label in range(len(found))]
            loss = -sum(share * math.log(one) for share, one in zip(spread, found, strict=True))
            rows.append((1 - found[right]) ** gamma * loss * (1 if weights is None else weights[right]))
            continue
        losses = []
        for place, (yes, one) in enumerate(zip(target, found, strict=True)):
            soft = yes * (1 - smoothing) + smoothing / 2
            loss = -soft * math.log(one) - (1 - soft) * math.log(1 - one)
            counts = 1.0
            if weights is not None:
                counts = weights[int(yes)] if task == "binary" else weights[place] if yes else 1.0
            losses.append((1 - (one if yes else 1 - one)) ** gamma * loss * counts)
        rows.append(sum(losses) / len(losses))
    return sum(rows) / len(rows)


def test_every_task_has_a_loss():
    assert {task for task, _ in ALL} == set(NUM_OUTPUTS_BY_TASK)


@pytest.mark.parametrize(("task", "loss"), [one for one in ALL if one[0] in WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_cross_entropies(task: str, loss: str, smoothing: float, is_weighted: bool):
    outputs, targets = draw_outputs(task)
    weights = WEIGHTS[task] if is_weighted else None
    found = head_loss(task, loss, outputs, targets, weights=weights, smoothing=smoothing)
    wanted = naive(task, outputs, targets, weights, smoothing, 2.0 if loss == "focal" else 0.0)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("task", ["binary", "multiclass", "ordinal"])
def test_against_scikit_learn(task: str):
    outputs, targets = draw_outputs(task)
    found = [chances(task, row) for row in outputs.double().tolist()]
    found = [[1 - one[0], one[0]] for one in found] if task == "binary" else found
    wanted = log_loss(targets[:, 0].long().numpy(), found, labels=range(len(found[0])))
    assert head_loss(task, next(iter(LOSSES[task])), outputs, targets).item() == pytest.approx(wanted, rel=1e-5)


def test_against_pytorch():
    outputs, targets = draw_outputs("multilabel")
    weights = torch.tensor(WEIGHTS["multilabel"])
    wanted = F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weights)
    assert torch.allclose(head_loss("multilabel", "bce", outputs, targets, weights=weights.tolist()), wanted)
    outputs, targets = draw_outputs("multiclass")
    wanted = F.cross_entropy(outputs, targets[:, 0].long(), label_smoothing=0.1)
    assert torch.allclose(head_loss("multiclass", "ce", outputs, targets, smoothing=0.1), wanted)
    outputs, targets = draw_outputs("regression")
    assert torch.allclose(head_loss("regression", "mse", outputs, targets), F.mse_loss(outputs, targets))
    for delta in (0.5, 1.0):
        found = head_loss("regression", "huber", outputs, targets, options={"delta": delta})
        assert torch.allclose(found, F.huber_loss(outputs, targets, delta=delta))
    assert torch.allclose(head_loss("regression", "huber", outputs, targets), F.huber_loss(outputs, targets))


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_focal_without_gamma_is_plain(task: str):
    outputs, targets = draw_outputs(task)
    plain = head_loss(task, next(iter(LOSSES[task])), outputs, targets, weights=WEIGHTS[task])
    found = head_loss(task, "focal", outputs, targets, weights=WEIGHTS[task], options={"gamma": 0.0})
    assert torch.allclose(found, plain)
    assert head_loss(task, "focal", outputs, targets, weights=WEIGHTS[task]) < plain


@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_has_a_slope_where_it_is_sure(task: str, gamma: float):
    """A root of 0 has none."""
    outputs = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])[:, : NUM_OUTPUTS_BY_TASK[task](2)].requires_grad_()
    losses = focal(outputs, torch.tensor([[1.0], [1.0]]), None, 0.0, gamma=gamma)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert isinstance(outputs.grad, Tensor)
    assert torch.isfinite(outputs.grad).all()


def test_one_label_of_multilabel_has_one_weight():
    outputs, targets = torch.randn(6, 1), torch.tensor([0.0, 1, 1, 0, 1, 0])[:, None]
    wanted = F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=torch.tensor([3.0]))
    assert torch.allclose(head_loss("multilabel", "bce", outputs, targets, weights=[3.0]), wanted)


def test_balanced_classes_weigh_alike():
    outputs, targets = torch.zeros(8, 1), torch.tensor([1.0, *[0.0] * 7])[:, None]
    outputs.requires_grad_()
    head_loss("binary", "bce", outputs, targets, weights=[8 / 14, 8 / 2]).backward()
    assert isinstance(outputs.grad, Tensor)
    assert outputs.grad.sum().item() == pytest.approx(0, abs=1e-6)


# Rows without a label


@pytest.mark.parametrize(("task", "loss"), ALL)
def test_rows_without_a_label_do_not_count(task: str, loss: str):
    """The loss is that of the other rows, they get no gradient, and nothing is NaN."""
    outputs, targets = draw_outputs(task)
    targets[::3] = torch.nan
    known = ~targets.isnan().any(dim=1)
    outputs[~known] *= 40
    outputs.requires_grad_()
    found = head_loss(task, loss, outputs, targets, smoothing=0.1)
    assert torch.allclose(found, head_loss(task, loss, outputs[known], targets[known], smoothing=0.1))
    found.backward()
    assert isinstance(outputs.grad, Tensor)
    assert torch.isfinite(outputs.grad).all()
    assert (outputs.grad[~known] == 0).all()
    assert (outputs.grad[known] != 0).any()


def test_a_row_that_lacks_one_of_several_labels_does_not_count():
    outputs, targets = draw_outputs("multilabel")
    targets[0, 2] = torch.nan
    assert torch.allclose(
        head_loss("multilabel", "bce", outputs, targets), head_loss("multilabel", "bce", outputs[1:], targets[1:])
    )


@pytest.mark.parametrize(("task", "loss"), ALL)
def test_without_any_label_there_is_a_graph_all_the_same(task: str, loss: str):
    """So that processes that wait for each other's gradients all have one."""
    outputs, targets = draw_outputs(task)
    outputs.requires_grad_()
    found = head_loss(task, loss, outputs, torch.full_like(targets, torch.nan))
    assert found.item() == 0
    found.backward()
    assert isinstance(outputs.grad, Tensor)
    assert (outputs.grad == 0).all()


@pytest.mark.parametrize(("task", "loss"), ALL)
def test_losses_are_in_single_precision_and_take_any_form_of_target(task: str, loss: str):
    outputs, targets = draw_outputs(task)
    found = head_loss(task, loss, outputs.bfloat16(), targets)
    assert found.dtype == torch.float32
    assert torch.allclose(found, head_loss(task, loss, outputs, targets), rtol=0.05)
    if task != "multilabel":
        flat = targets[:, 0].long() if task != "regression" else targets[:, 0]
        assert torch.equal(head_loss(task, loss, outputs, flat), head_loss(task, loss, outputs, targets))
    strided = torch.stack([targets.T, targets.T], dim=-1)[..., 0].T
    assert torch.equal(head_loss(task, loss, outputs, strided), head_loss(task, loss, outputs, targets))


# Ranking


def ranked(outputs: Tensor, targets: Tensor, groups: list[int], margin: float) -> float:
    """All pairs, one by one."""
    losses = [
        max(0.0, margin - (outputs[better].item() - outputs[worse].item()))
        for better in range(ROWS)
        for worse in range(ROWS)
        if groups[better] == groups[worse] and targets[better] > targets[worse]
    ]
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("groups", [[0] * ROWS, [0, 1, 2] * 4, [-1, 5, 5, *range(10, 19)], list(range(ROWS))])
def test_ranking(margin: float, groups: list[int]):
    outputs, targets = draw_outputs("pairwise")
    targets[3] = torch.nan
    wanted = ranked(outputs, targets, groups, margin)
    found = head_loss(
        "pairwise", "margin", outputs, targets, groups=torch.tensor(groups), options={"margin": margin}
    )  # fmt: skip
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    assert margin_ranking(outputs, targets, torch.tensor(groups), margin=margin).item() == pytest.approx(wanted)


def test_without_groups_all_rows_are_compared():
    outputs, targets = draw_outputs("pairwise")
    assert head_loss("pairwise", "margin", outputs, targets).item() == pytest.approx(
        ranked(outputs, targets, [0] * ROWS, 1.0), rel=1e-5
    )


# Ordered labels


@pytest.mark.parametrize("score", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("gap", [1.0, 1e-3, 1e-7, 0.0])
def test_ordinal_stays_finite_where_cut_points_nearly_coincide(score: float, gap: float):
    outputs = (score - gap * torch.arange(LABELS - 1.0)).expand(LABELS, -1).clone().requires_grad_()
    found = head_loss("ordinal", "ordinal", outputs, torch.arange(LABELS), smoothing=0.1)
    found.backward()
    assert torch.isfinite(found)
    assert isinstance(outputs.grad, Tensor)
    assert torch.isfinite(outputs.grad).all()


def test_ordinal_survives_rounding_that_turns_the_order():
    outputs = torch.tensor([[1.0, 1.0 + 1e-6, 1.0]], requires_grad=True)
    for target in range(LABELS):
        found = head_loss("ordinal", "ordinal", outputs, torch.tensor([[float(target)]]))
        assert torch.isfinite(found)
        assert torch.isfinite(torch.autograd.grad(found, outputs)[0]).all()


def test_ordinal_is_exact_for_numbers_far_out():
    """A difference of sigmoids would be 0 there."""
    outputs = torch.tensor([[41.0, 40.0, 39.0]])
    wanted = -math.log(math.exp(-40) - math.exp(-41))
    assert head_loss("ordinal", "ordinal", outputs, torch.tensor([1])).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("steps", [0.0, -5.0])
def test_ordinal_learns_where_every_label_begins(steps: float):
    """Also from cut points that nearly coincide at first, which the loss drives apart."""
    cuts = OrdinalThresholds(LABELS - 1)
    torch.nn.init.constant_(cuts.steps, steps)  # -5: gaps of 0.007
    scores = torch.tensor([-3.0, -1.0, 1.0, 3.0]).repeat(5)[:, None]
    targets = torch.arange(LABELS).repeat(5)
    optimizer = torch.optim.Adam(cuts.parameters(), lr=0.1)
    losses: list[Any] = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(head_loss("ordinal", "ordinal", cuts(scores), targets))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert (-cuts(torch.zeros(1))).tolist() == pytest.approx([-2, 0, 2], abs=0.3)
