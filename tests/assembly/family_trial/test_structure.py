"""Proofs about parts, gradients and saving: each fails for a family that is wrong in its way."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.assembly.family_trial.subjects import changed_family, check_fails, check_proved, make_subject
from vlm.families.table import LLAVA_PARTS, LLAVA_UNUSED_PREFIXES, QWEN_PARTS, make_parts

TEXT_PARTS = ("model.language_model.", "lm_head.")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (make_parts("model.vision_towr.", "model.multi_modal_projector."), "begins with no prefix of a part"),
        (make_parts("model.nothing.", "model.multi_modal_projector.", language_model="model."), "the visual_encoder"),
        (make_parts("model.vision_tower.", "model.nothing.", language_model="model."), "the connector"),
        (
            {"visual_encoder": ("model.multi_modal_projector.",), "connector": ("model.language_model.norm.",),
             "language_model": ("model.vision_tower.", *TEXT_PARTS)},
            "of get_encoder(modality='image') belongs to the language_model",
        ),
        (
            {**LLAVA_PARTS, "connector": ("model.multi_modal_projector.", "model.language_model.embed_tokens.")},
            "of get_input_embeddings belongs to the connector",
        ),
    ],
)  # fmt: skip
def test_wrong_prefixes_are_found(monkeypatch: pytest.MonkeyPatch, parts: dict[str, tuple[str, ...]], reason: str):
    changed_family(monkeypatch, "llava", parts=parts)
    check_fails("parts", make_subject(), reason)


def test_one_parameter_in_two_parts_is_found(monkeypatch: pytest.MonkeyPatch):
    parts = {**QWEN_PARTS, "connector": ("model.visual.merger.", "lm_head."), "language_model": TEXT_PARTS[:1]}
    changed_family(monkeypatch, "qwen2_vl", parts=parts)
    subject = make_subject("qwen2-vl")
    subject.model.lm_head.weight = subject.model.get_input_embeddings().weight
    check_fails("parts", subject, "under another name")


def test_gradients_that_do_not_arrive_are_found():
    subject = make_subject()
    check_proved("gradients", subject)
    subject.model.model.multi_modal_projector.register_forward_hook(lambda module, inputs, output: output.detach())
    check_fails("gradients", subject, "with the visual_encoder trained alone, no gradient reaches")


def test_what_is_not_read_has_to_be_declared(monkeypatch: pytest.MonkeyPatch):
    changed_family(monkeypatch, "llava", unused_prefixes=())
    check_fails("gradients", make_subject("llava-1.5"), "has to be declared as unused")
    declared = (*LLAVA_UNUSED_PREFIXES, "model.multi_modal_projector.linear_1.bias")
    changed_family(monkeypatch, "llava", unused_prefixes=declared)
    check_fails("gradients", make_subject(), "gets gradients, but is declared as unused")


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
