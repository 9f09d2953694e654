"""Training's own path: what a record becomes there is what a question becomes when it is asked."""

import pytest
import torch

from tests.inference.verify.conftest import Served
from vlm.data.sample import Sample, Turn
from vlm.data.vision.images import open_media
from vlm.inference.verify.cases import Case, make_cases
from vlm.inference.verify.reference import Reference


def test_ids_before_a_reply_are_those_of_a_question(served: Served):
    reference = Reference(served.model)
    for case in make_cases(8):
        asked = served.model.inputs([case.turns], [open_media(Sample(case.name, case.turns))])
        inputs = reference.inputs(case)
        assert inputs.keys() == asked.keys()
        assert all(torch.equal(inputs[name], asked[name]) for name in asked)


def test_a_dummy_image_changes_no_logits(served: Served):
    text_only = make_cases(4)[3]
    reference = Reference(served.model)
    outputs = reference.outputs(text_only)
    assert "pixels" not in outputs
    alone = served.model.model(**reference.inputs(text_only)).logits[0]
    assert (outputs["logits"] - alone[-len(outputs["logits"]) :]).abs().max() < 1e-5
    assert "pixel_values" in reference._training_batch(text_only)


def test_layers_have_the_names_of_engines(served: Served):
    outputs = Reference(served.model).trace(make_cases(1)[0])
    names = ["visual encoder layer 1", "visual encoder layer 2", "image features", "connector"]
    assert [*outputs] == [*names, "language model layer 1", "language model layer 2"]
    assert outputs["image features"].shape == (1, 9, 32)
    assert outputs["language model layer 1"].ndim == 2


def test_what_a_template_refuses_is_left_out(served: Served):
    cases = [Case("empty", (Turn("tool", ("x",)),)), *make_cases(1)]
    kept, reasons = Reference(served.model).usable(cases, 3)
    assert [case.name for case in kept] == ["made-000"] or not reasons


def test_the_margin_of_answers(served: Served):
    reference = Reference(served.model)
    case = make_cases(1)[0]
    answer = reference.answer(case, 3)
    assert reference.margin(case, answer, answer) == 0
    assert reference.margin(case, answer, f"{answer} or not") > 1e-3
    assert reference.margin(case, answer, "z") == pytest.approx(reference.margin(case, "z", answer))
