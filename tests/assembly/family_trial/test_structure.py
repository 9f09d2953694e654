"""Proofs about parts and saving: each fails for a family that is wrong in its way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.assembly.family_trial.subjects import check_fails, check_proved, make_subject
from vlm.assembly.family_trial.structure import describe_lack
from vlm.families.parts import PartNames

VISION, CONNECTOR, TEXT = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
HEAD = "lm_head."
PREFIXES = {VISION: "visual_encoder", CONNECTOR: "connector", TEXT: "language_model", HEAD: "language_model"}
"""The parts of a LLaVA."""
UNUSED = ("model.vision_tower.post_layernorm.",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({VISION: None}, "matches no part"),
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


def test_a_part_that_a_model_names_no_modules_of_may_be_empty():
    subject = make_subject()
    assert describe_lack(subject, "connector") == describe_lack(subject, "visual_encoder") == ""
    subject.model.model.multi_modal_projector = nn.Identity()
    assert "nothing lies between" in describe_lack(subject, "connector")
    assert describe_lack(subject, "language_model") == ""
    subject.model.get_encoder = lambda modality: None
    assert describe_lack(subject, "connector") == describe_lack(subject, "visual_encoder") == ""
    subject.model.model.vision_tower = nn.Identity()
    assert "names no visual encoder" in describe_lack(subject, "visual_encoder")


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
