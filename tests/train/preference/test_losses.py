"""Each loss and its gradients equal a plain reference of a few lines, of logits and labels, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.config.choices import PREFERENCE_LOSSES, PREFERENCE_METRICS
from vlm.config.preference_schema import PreferenceOptions
from vlm.data.encoding.preference import CHOSEN, MISMATCHED, REJECTED
from vlm.train.preference.losses import (
    PAIR_LOSSES,
    SideScores,
    estimate_divergence,
    get_beta,
    record_losses,
    rewards,
    uses_reference,
)
from vlm.train.preference.metrics import StepMetrics, bootstrap_records, evaluate_records, metric_sums

PAIRS = 4


def plain_pair(name: str, c: Tensor, r: Tensor, rc: Tensor, rr: Tensor, options: PreferenceOptions) -> Tensor:
    """The loss of one pair: log-probabilities of the tokens of both sides, and the reference's."""
    b = get_beta(options)
    ratio_c, ratio_r = (c - rc).sum(), (r - rr).sum()
    h, s = b * (ratio_c - ratio_r), options.label_smoothing
    if name == "dpo":
        return -(1 - s) * torch.log(torch.sigmoid(h)) - s * torch.log(torch.sigmoid(-h))
    if name == "robust":
        return (-(1 - s) * torch.log(torch.sigmoid(h)) + s * torch.log(torch.sigmoid(-h))) / (1 - 2 * s)
    if name == "ipo":
        return ((c - rc).mean() - (r - rr).mean() - 1 / (2 * b)) ** 2
    if name == "hinge":
        return torch.clamp(1 - h, min=0)
    if name == "apo_zero":
        return 1 - torch.sigmoid(b * ratio_c) + torch.sigmoid(b * ratio_r)
    if name == "simpo":
        z = b * c.mean() - b * r.mean() - options.simpo_gamma
        return -(1 - s) * logsigmoid(z) - s * logsigmoid(-z)
    p, q = torch.exp(c.mean()), torch.exp(r.mean())
    return -b * torch.log(torch.sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))


def token_log_probs(lengths: list[list[int]]) -> list[list[Tensor]]:
    """Log-probabilities of the tokens of each side of each record, in float64."""
    return [[(-3 * torch.rand(n, dtype=torch.float64) - 0.05).requires_grad_() for n in row] for row in lengths]


def as_sides(policy: list[list[Tensor]], reference: list[list[Tensor]] | None) -> SideScores:
    def table(rows: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.stack([side.sum() for side in row]) for row in rows])

    tokens = torch.tensor([[len(side) for side in row] for row in policy], dtype=torch.float64)
    return SideScores(table(policy), tokens, None if reference is None else table(reference).detach())


LENGTHS = [[3, 5, 0], [1, 1, 0], [7, 2, 0], [4, 4, 0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, 0.7])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_of_pairs_and_their_gradients_equal_plain_ones(name: str, weight: float | None, smoothing: float):
    options = PreferenceOptions(loss=name, supervised_weight=weight, label_smoothing=smoothing, beta=0.4)
    policy, reference = token_log_probs(LENGTHS), token_log_probs(LENGTHS)
    sides = as_sides(policy, reference if uses_reference(options) else None)
    losses = record_losses(sides, options)
    share = float(name == "orpo") if weight is None else weight
    plain = torch.stack([
        plain_pair(name, c, r, rc, rr, options) - share * c.mean()
        for (c, r, _), (rc, rr, _) in zip(policy, reference, strict=True)
    ])  # fmt: skip
    assert torch.allclose(losses, plain, rtol=1e-9)
    leaves = [side for row in policy for side in row[:2]]
    expected = torch.autograd.grad(plain.mean(), leaves, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(losses.mean(), leaves, allow_unused=True)
    for gradient, other in zip(found, expected, strict=True):
        assert torch.allclose(gradient, torch.zeros_like(gradient) if other is None else other, rtol=1e-8, atol=1e-12)


def test_kto_and_its_gradients_equal_a_plain_one():
    options = PreferenceOptions(loss="kto", desirable_weight=1.3, undesirable_weight=0.6, supervised_weight=0.5)
    lengths = [[3, 0, 2], [0, 4, 1], [2, 5, 3]]  # a wanted reply, an unwanted one, and a pair
    policy, reference = token_log_probs(lengths), token_log_probs(lengths)
    sides = as_sides(policy, reference)
    total, number = estimate_divergence(sides)
    losses = record_losses(sides, options, total / number)
    z = max(sum(float((p[2] - r[2]).sum().detach()) for p, r in zip(policy, reference, strict=True)) / 3, 0)
    plain = torch.zeros((), dtype=torch.float64)
    for p, r in zip(policy, reference, strict=True):
        if len(p[0]):
            plain = plain + 1.3 * (1 - torch.sigmoid(0.1 * ((p[0] - r[0]).sum() - z))) - 0.5 * p[0].mean()
        if len(p[1]):
            plain = plain + 0.6 * (1 - torch.sigmoid(0.1 * (z - (p[1] - r[1]).sum())))
    assert float(losses.sum().detach()) == pytest.approx(float(plain.detach()), rel=1e-9)
    leaves = [side for row in policy for side in row[:2] if len(side)]
    expected = torch.autograd.grad(plain, leaves, retain_graph=True)
    found = torch.autograd.grad(losses.sum(), leaves, retain_graph=True)
    assert all(torch.allclose(one, other, rtol=1e-9) for one, other in zip(found, expected, strict=True))
    mismatched = [row[2] for row in policy]
    assert not any(gradient.any() for gradient in torch.autograd.grad(losses.sum(), mismatched)), "an estimate alone"


def test_the_divergence_of_kto_is_never_below_zero():
    options = PreferenceOptions(loss="kto")
    sides = as_sides(token_log_probs([[3, 0, 2]]), token_log_probs([[3, 0, 2]]))
    below = record_losses(sides, options, torch.tensor(-5.0, dtype=torch.float64))
    assert torch.equal(below, record_losses(sides, options, torch.tensor(0.0, dtype=torch.float64)))


def test_every_loss_has_a_function_and_defaults():
    assert {*PAIR_LOSSES, "kto"} == {*PREFERENCE_LOSSES}
    assert get_beta(PreferenceOptions(loss="simpo")) == 2
    assert record_losses(
        SideScores(torch.zeros(1, 3), torch.tensor([[1.0, 1, 0]]), torch.zeros(1, 3)), PreferenceOptions()
    ).tolist() == pytest.approx([math.log(2)])


def test_a_certain_reply_has_odds_too():
    sides = SideScores(torch.tensor([[0.0, -1, 0]], requires_grad=True), torch.tensor([[1.0, 1, 0]]))
    record_losses(sides, PreferenceOptions(loss="orpo")).sum().backward()
    assert sides.log_probs.grad is not None
    assert torch.isfinite(sides.log_probs.grad).all()


def scores_of(chosen: list[float], rejected: list[float]) -> SideScores:
    tables = torch.zeros(len(chosen), 3), torch.zeros(len(chosen), 3)
    for role, values in ((CHOSEN, chosen), (REJECTED, rejected)):
        tables[0][:, role] = torch.tensor(values)
        tables[1][:, role] = 2
    return SideScores(*tables, torch.full((len(chosen), 3), -2.0))


def test_what_is_logged_of_pairs():
    options, metrics = PreferenceOptions(beta=0.5), StepMetrics()
    for sides in (scores_of([-1.0, -3.0], [-2.0, -1.0]), scores_of([-2.0], [-6.0])):
        metrics.add(metric_sums(sides, options))
    logged = metrics.take(lambda tensor: tensor.repeat(2, 1, 1))
    assert logged == pytest.approx({
        "reward_chosen": (0.5 - 0.5 + 0) / 3, "reward_rejected": (0 + 0.5 - 2) / 3, "margin": (0.5 - 1 + 2) / 3,
        "reward_accuracy": 2 / 3, "kl": (-0.5 - 0 + 2) / 3,
    })  # fmt: skip
    assert metrics.take(lambda tensor: tensor) == {}


def test_losses_without_a_reference_log_no_divergence():
    options, metrics = PreferenceOptions(loss="simpo"), StepMetrics()
    sides = replace(scores_of([-1.0], [-2.0]), reference=None)
    metrics.add(metric_sums(sides, options))
    logged = metrics.take(lambda tensor: tensor)
    assert logged.keys() == {*PREFERENCE_METRICS} - {"kl"}
    assert logged["margin"] == pytest.approx(2 * (1 - 0.5))
    assert torch.equal(rewards(sides, options)[:, MISMATCHED], torch.zeros(1))


def test_what_is_logged_of_single_replies():
    options = PreferenceOptions(loss="kto", beta=1.0)
    reference = torch.full((2, 3), -2.0)
    tokens = torch.tensor([[2.0, 0, 2], [0, 2, 2]])
    sides = SideScores(torch.tensor([[-1.0, 0, -1.5], [0, -3.0, -1.5]]), tokens, reference)
    metrics = StepMetrics()
    metrics.add(metric_sums(sides, options, torch.tensor(0.5)))
    logged = metrics.take(lambda tensor: tensor)
    assert logged == pytest.approx({"reward_chosen": 1, "reward_rejected": -1, "reward_accuracy": 1, "kl": 0.5})


def test_evaluations_have_intervals_over_records():
    options = PreferenceOptions(beta=0.5)
    sides = scores_of([-1.0, -3.0, -2.0] * 20, [-2.0, -1.0, -6.0] * 20)
    scores = bootstrap_records(evaluate_records(sides, options))
    assert scores["loss"].value == pytest.approx(float(record_losses(sides, options).mean()))
    margin = scores["margin"]
    assert margin.value == pytest.approx(0.5)
    assert margin.low is not None
    assert margin.high is not None
    assert margin.low < 0.5 < margin.high
