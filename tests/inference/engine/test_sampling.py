"""Penalties, bias and log probabilities."""

import pytest
import torch

from tests.families.tiny_families import tokenizer as family_tokenizer
from vlm.inference.engine.constraints import ConstraintCompiler
from vlm.inference.engine.options import SamplingOptions
from vlm.inference.engine.sampling import AnswerPenalties, Sampler, make_logprob

CPU = torch.device("cpu")


def test_penalties_count_the_answer_and_not_the_prompt():
    penalties = AnswerPenalties(0.5, 1.0, 2)
    scores = penalties(torch.tensor([[3, 3, 4, 4, 5]]), torch.zeros(1, 7))
    assert scores.tolist() == [[0, 0, 0, 0, -2.0, -1.5, 0]]


def test_a_bias_and_a_penalty_change_the_choice():
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.5]])
    ids = torch.tensor([[0, 2]])
    assert Sampler(SamplingOptions(9), 1, CPU).choose(ids, logits) == 2
    assert Sampler(SamplingOptions(9, presence_penalty=1.0), 1, CPU).choose(ids, logits) == 3
    assert Sampler(SamplingOptions(9, presence_penalty=1.0), 2, CPU).choose(ids, logits) == 2
    assert Sampler(SamplingOptions(9, logit_bias={1: 9.0}), 1, CPU).choose(ids, logits) == 1
    assert logits.tolist() == [[0.0, 1.0, 3.0, 2.5]]


def test_a_seed_draws_the_same_tokens_and_their_shares_are_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    ids = torch.tensor([[0]])
    first, second = (Sampler(SamplingOptions(9, temperature=1, seed=5), 1, CPU) for _ in range(2))
    drawn = [first.choose(ids, logits) for _ in range(400)]
    assert drawn == [second.choose(ids, logits) for _ in range(400)]
    shares = torch.tensor(drawn).bincount(minlength=3) / 400
    assert torch.allclose(shares, logits.softmax(-1)[0], atol=0.08)


def test_logprobs_are_the_models_own():
    words = family_tokenizer(None)
    compiler = ConstraintCompiler(words, [words.eos_token_id])
    a, b, part = (words.convert_tokens_to_ids(letter) for letter in ("a", "b", "Ã"))
    logits = torch.full((len(words),), -5.0)
    logits[[a, b, part]] = torch.tensor([1.0, 3.0, 2.0])
    found = make_logprob(logits, a, 2, compiler)
    expected = logits.log_softmax(-1)
    assert (found.token_id, found.token, found.bytes) == (a, "a", (97,))
    assert found.logprob == pytest.approx(float(expected[a]))
    assert [(one.token_id, one.token, one.bytes) for one in found.top] == [(b, "b", (98,)), (part, "�", (0xC3,))]
    assert found.top[0].logprob == pytest.approx(float(expected[b]))
    assert make_logprob(logits, a, 0, compiler).top == ()
