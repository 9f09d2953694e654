"""Divergences and their gradients against the plain formulas, and what a few kept tokens are worth."""

import math

import pytest
import torch
from torch import Tensor

from vlm.train.distillation.divergences import (
    DIVERGENCES,
    coarse_log_probabilities,
    decode_rows,
    encode_rows,
    log_probabilities,
    row_bytes,
)

POSITIONS, VOCABULARY = 5, 11
TEMPERATURES = (1.0, 2.5)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """A teacher's and a student's logits."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64) * 3
    return teacher, student.requires_grad_()


def plain(name: str, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """The divergence as papers write it: sums of p log(p / q), token by token."""

    def divide(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(-1)

    p, q = ((given / temperature).exp() for given in (teacher, student))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    middle = (p + q) / 2
    return {
        "forward": lambda: divide(p, q),
        "reverse": lambda: divide(q, p),
        "jensen_shannon": lambda: divide(p, middle) / 2 + divide(q, middle) / 2,
    }[name]()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_are_those_of_the_plain_formula(
    name: str, temperature: float, logits: tuple[Tensor, Tensor]
):
    teacher, student = logits
    pair = (log_probabilities(given, temperature) for given in (teacher, student))
    values = DIVERGENCES[name](*pair)
    expected = plain(name, teacher, student, temperature)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str, logits: tuple[Tensor, Tensor]):
    teacher, _ = logits
    student = teacher.clone().requires_grad_()
    values = DIVERGENCES[name](log_probabilities(teacher, 1), log_probabilities(student, 1))
    assert values.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tokens_that_a_teacher_rules_out_make_no_infinity(name: str, logits: tuple[Tensor, Tensor]):
    teacher, student = logits
    teacher = teacher.clone()
    teacher[:, 3] = -math.inf
    values = DIVERGENCES[name](log_probabilities(teacher, 1), log_probabilities(student, 1))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_few_tokens_and_the_rest_are_a_lower_bound(name: str, logits: tuple[Tensor, Tensor]):
    """The more tokens are kept, the closer; with all of them it is the divergence."""
    teacher, student = logits
    whole = DIVERGENCES[name](log_probabilities(teacher, 2), log_probabilities(student, 2))
    before = torch.zeros_like(whole)
    for kept in (1, 3, 7, VOCABULARY):
        ids = teacher.topk(kept, dim=-1).indices
        pair = (coarse_log_probabilities(given, ids, 2) for given in (teacher, student))
        values = DIVERGENCES[name](*pair)
        assert (values >= before - 1e-6).all()
        assert (values <= whole + 1e-6).all()
        before = values
    torch.testing.assert_close(before, whole)


def test_what_is_left_out_is_the_divergence_within_the_rest(logits: tuple[Tensor, Tensor]):
    """KL = KL of the classes + r KL(p within the rest | q within the rest), with the teacher's mass r of the rest."""
    teacher, student = logits
    ids = teacher.topk(4, dim=-1).indices
    coarse = [coarse_log_probabilities(given, ids, 1) for given in (teacher, student)]
    rest = [given.float().scatter(-1, ids, -math.inf).log_softmax(-1) for given in (teacher, student)]
    within = torch.where(rest[0].exp() > 0, rest[0].exp() * (rest[0] - rest[1]), 0).sum(-1)
    whole = DIVERGENCES["forward"](log_probabilities(teacher, 1), log_probabilities(student, 1))
    left_out = coarse[0][:, -1].exp() * within
    torch.testing.assert_close(DIVERGENCES["forward"](*coarse) + left_out, whole)
    assert (left_out > 1e-4).all()


@pytest.mark.parametrize("top_k", [1, 4, VOCABULARY, 100])
def test_rows_hold_the_likeliest_tokens_and_the_mass_of_the_rest(top_k: int, logits: tuple[Tensor, Tensor]):
    teacher, _ = logits
    rows = encode_rows(teacher, top_k, 2)
    assert rows.shape == (POSITIONS, row_bytes(top_k, VOCABULARY))
    ids, log_p = decode_rows(rows, top_k, VOCABULARY)
    assert torch.equal(ids, teacher.topk(min(top_k, VOCABULARY), dim=-1).indices)
    expected = coarse_log_probabilities(teacher, ids, 2)
    torch.testing.assert_close(log_p, expected, rtol=2e-3, atol=2e-3)  # half precision
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(POSITIONS))


def test_rows_of_any_chunk_are_read(logits: tuple[Tensor, Tensor]):
    """A single row, which begins anywhere in memory, and none."""
    rows = encode_rows(logits[0], 3, 1)
    ids, log_p = decode_rows(rows, 3, VOCABULARY)
    for place in range(POSITIONS):
        own_ids, own = decode_rows(rows[place : place + 1], 3, VOCABULARY)
        assert torch.equal(own_ids, ids[place : place + 1])
        assert torch.equal(own, log_p[place : place + 1])
    empty_ids, empty = decode_rows(rows[:0], 3, VOCABULARY)
    assert (empty_ids.shape, empty.shape) == ((0, 3), (0, 4))
