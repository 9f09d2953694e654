"""Proofs about parts, gradients and saving: each fails for a family that is wrong in its way."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.assembly.family_trial.subjects import check_fails, check_proved, make_subject
from vlm.families.parts import PartNames

VISION, CONNECTOR, TEXT = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
HEAD = "lm_head."
PREFIXES = {VISION: "visual_encoder", CONNECTOR: "connector", TEXT: "language_model", HEAD: "language_model"}
"""The parts of a LLaVA."""
UNUSED = ("model.vision_tower.post_layernorm.",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({VISION: None}, "begins with no prefix of a part"),
        ({VISION: "language_model"}, "no parameter belongs to the visual_encoder"),
        ({CONNECTOR: "language_model"}, "no parameter belongs to the connector"),
        (
            {VISION: "language_model", CONNECTOR: "visual_encoder", f"{TEXT}norm.": "connector"},
            "of get_encoder(modality='image') belongs to the language_model",
        ),
        ({f"{TEXT}embed_tokens.": "connector"}, "of get_input_embeddings belongs to the connector"),
    ],
)
def test_wrong_prefixes_are_found(changes: dict[str, str | None], reason: str):
    subject = make_subject()
    check_proved("parts", subject)
    prefixes = {prefix: part for prefix, part in {**PREFIXES, **changes}.items() if part is not None}
    subject.names = PartNames(prefixes, UNUSED)
    check_fails("parts", subject, reason)


def test_one_parameter_in_two_parts_is_found():
    subject = make_subject()
    subject.model.lm_head.weight = subject.model.get_input_embeddings().weight
    subject.names = PartNames({**PREFIXES, HEAD: "connector"}, UNUSED)
    check_fails("parts", subject, "under another name")


def test_gradients_that_do_not_arrive_are_found():
    subject = make_subject()
    check_proved("gradients", subject)
    subject.model.model.multi_modal_projector.register_forward_hook(lambda module, inputs, output: output.detach())
    check_fails("gradients", subject, "with the visual_encoder trained alone, no gradient reaches")


def test_what_is_not_read_has_to_be_declared():
    subject = make_subject()
    subject.names = PartNames(PREFIXES)
    check_fails("gradients", subject, "no gradient reaches model.vision_tower.post_layernorm.weight")
    subject.names = PartNames(PREFIXES, (*UNUSED, f"{CONNECTOR}linear_1.bias"))
    check_fails("gradients", subject, "gets gradients, but is declared as unused")


def test_a_proof_of_gradients_leaves_none_behind():
    subject = make_subject()
    check_proved("gradients", subject)
    assert all(weight.grad is None and weight.requires_grad for weight in subject.model.parameters())


def test_a_weight_that_is_not_saved_is_found():
    subject = make_subject()
    check_proved("saving", subject)
    subject.model._keys_to_ignore_on_save = {"model.multi_modal_projector.linear_1.weight"}
    check_fails("saving", subject, "the saved model lacks: model.multi_modal_projector.linear_1.weight")


def test_a_weight_that_changes_on_the_way_is_found():
    subject = make_subject()
    save = subject.model.save_pretrained

    def save_changed(folder: Path, **options: Any) -> None:
        """Write another weight than the model has."""
        with torch.no_grad():
            subject.model.lm_head.weight.add_(1)
            save(folder, **options)
            subject.model.lm_head.weight.sub_(1)

    subject.model.save_pretrained = save_changed
    check_fails("saving", subject, "logits of the saved model differ by")


def test_a_processor_that_is_saved_otherwise_is_found(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject()
    save = subject.processor.native.save_pretrained

    def save_changed(folder: Path) -> None:
        """Write another template than the processor has."""
        template = subject.processor.native.chat_template
        subject.processor.native.chat_template = template.replace("<|turn|>", "<|user|>")
        save(folder)
        subject.processor.native.chat_template = template

    monkeypatch.setattr(subject.processor.native, "save_pretrained", save_changed)
    check_fails("saving", subject, "the saved processor gives other ids")
