"""The proof about gradients: it fails for a family whose training would not reach what replies depend on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.assembly.family_trial.subjects import check_fails, check_proved, make_subject
from tests.assembly.family_trial.test_structure import CONNECTOR, PREFIXES, UNUSED
from vlm.assembly.family_trial.conversations import draw_image, one_turn
from vlm.assembly.family_trial.gradients import are_idle, shorten_forms
from vlm.assembly.family_trial.table import PROOFS, make_proof
from vlm.families.parts import PartNames


def detach(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """A hook that stops gradients."""
    return output.detach()


def test_gradients_that_do_not_arrive_are_found():
    subject = make_subject()
    check_proved("gradients", subject)
    subject.model.model.multi_modal_projector.register_forward_hook(detach)
    check_fails("gradients", subject, "with the visual_encoder trained alone, no gradient reaches")


def test_what_replies_depend_on_without_a_gradient_is_found():
    subject = make_subject()
    for layer in subject.model.model.language_model.layers:
        layer.mlp.down_proj.register_forward_hook(detach)
    check_fails("gradients", subject, "although logits change with them")


def test_a_layer_that_gets_no_gradient_where_others_do_is_found():
    subject = make_subject()
    subject.model.model.language_model.layers[0].mlp.register_forward_hook(detach)
    check_fails("gradients", subject, "but others of the same name in other layers")


def test_what_is_not_read_is_declared_or_found():
    subject = make_subject()
    subject.names = PartNames(PREFIXES)
    found = str(make_proof(PROOFS["gradients"], subject))
    assert found == "proved: no reply depends on model.vision_tower.post_layernorm."
    subject.names = PartNames(PREFIXES, (*UNUSED, f"{CONNECTOR}linear_1.bias"))
    check_fails("gradients", subject, "gets gradients, but is declared as unused")


def test_a_part_that_replies_hardly_depend_on_fails():
    subject = make_subject()
    projector = subject.model.model.multi_modal_projector
    projector.forward = lambda features: features.mean(-1, keepdim=True) + projector.linear_2.bias
    check_fails("gradients", subject, "linear_2.weight: most of its parameters")


def test_a_choice_has_no_gradient_and_moves_nothing():
    subject = make_subject()
    gate = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    subject.model.model.language_model.gate = gate
    layer = subject.model.model.language_model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output * (1 + gate.argmax()))
    subject.names = PartNames(PREFIXES, UNUSED)
    verdict = make_proof(PROOFS["gradients"], subject)
    assert str(verdict) == "proved: no reply depends on model.language_model.gate"
    batch = subject.make_batch(one_turn(draw_image(1)))
    assert are_idle(subject, ["model.language_model.gate"], [batch])
    assert not are_idle(subject, [f"{CONNECTOR}linear_1.bias"], [batch])


def test_a_proof_of_gradients_leaves_none_behind():
    subject = make_subject()
    check_proved("gradients", subject)
    assert all(weight.grad is None and weight.requires_grad for weight in subject.model.parameters())


@pytest.mark.parametrize("takes_all", [True, False])
def test_logits_at_all_positions_are_as_good_and_others_are_not(takes_all: bool, monkeypatch: pytest.MonkeyPatch):
    subject = make_subject()
    forward = subject.model.forward

    def return_others(*args: Any, logits_to_keep: Any = 0, **inputs: Any) -> Any:
        """Return all logits whatever is asked for, or those of the last position."""
        return forward(*args, **inputs, logits_to_keep=0 if takes_all else 1)

    monkeypatch.setattr(subject.model, "forward", return_others)
    if takes_all:
        check_proved("gradients", subject)
    else:
        check_fails("gradients", subject, "which are neither these nor all")


def test_a_loss_that_training_computes_otherwise_is_found(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject()
    forward = subject.model.forward

    def return_neighbours(*args: Any, logits_to_keep: Any = 0, **inputs: Any) -> Any:
        """Return logits of the positions behind those that are asked for."""
        keep = logits_to_keep.roll(1, 1) if isinstance(logits_to_keep, Tensor) else logits_to_keep
        return forward(*args, **inputs, logits_to_keep=keep)

    monkeypatch.setattr(subject.model, "forward", return_neighbours)
    check_fails("gradients", subject, "the loss of a reply as training computes it")


def test_forms_are_as_short_as_they_tell_apart():
    others = ["model.layers.*.mlp.weight", "model.norm.weight"]
    idle = ["model.layers.*.indexer.k.weight", "model.layers.*.indexer.q.weight", "model.norm.bias", "head.weight"]
    assert shorten_forms(idle, others) == ["head.", "model.layers.*.indexer.", "model.norm.bias"]
