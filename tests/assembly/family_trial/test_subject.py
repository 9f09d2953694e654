"""The small model on trial: the same each time, and every path through it carries something."""

import torch

from tests.assembly.family_trial.subjects import make_subject
from vlm.assembly.family_trial.conversations import draw_image, one_turn
from vlm.assembly.family_trial.subject import list_names, relative_difference, supervised_next


def test_a_subject_is_the_same_each_time_and_leaves_the_runs_random_state():
    state = torch.get_rng_state()
    weights = [dict(make_subject("mllama").model.named_parameters()) for _ in range(2)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert torch.equal(torch.get_rng_state(), state)


def test_gates_that_begin_closed_are_open():
    gates = [weight for name, weight in make_subject("mllama").model.named_parameters() if name.endswith("gate")]
    assert gates
    assert all(bool(gate.any()) for gate in gates)


def test_a_conversation_is_encoded_and_computed_once():
    subject = make_subject()
    assert subject.alone_logits(one_turn(draw_image(1))) is subject.alone_logits(one_turn(draw_image(1)))
    assert subject.alone_logits(one_turn(draw_image(2))) is not subject.alone_logits(one_turn(draw_image(1)))
    row = subject.make_row(one_turn(draw_image(1)))
    row["labels"] = []
    assert subject.make_row(one_turn(draw_image(1)))["labels"]


def test_a_token_that_a_run_adds_has_an_embedding():
    subject = make_subject(change=lambda native: native.tokenizer.add_tokens([f"<new-{i}>" for i in range(100)]))
    assert subject.model.get_input_embeddings().num_embeddings >= len(subject.processor.tokenizer)


def test_helpers():
    assert supervised_next(torch.tensor([[-100, 5, -100, 7]])).tolist() == [[True, False, True, False]]
    assert relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == 0.2
    lowest = torch.finfo(torch.float32).min  # of a token that is ruled out
    assert relative_difference(torch.tensor([3.0, 4.0, lowest]), torch.tensor([3.0, 3.0, lowest])) == 0.2
    assert relative_difference(torch.tensor([3.0, 4.0, lowest]), torch.tensor([3.0, 4.0, 5.0])) == 1
    assert list_names(["a", "b", "c", "d"]) == "a, b, c and 1 more"
