"""The engines of the exports to ONNX and GGUF: what they observe of a checkpoint and of a wrong export."""

import importlib.util
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.inference.verify.conftest import Served
from vlm.data.sample import ImageRef, Turn
from vlm.inference.verify.cases import Case
from vlm.inference.verify.engines import LOGITS, NUM_IDS, Request, load_engine
from vlm.inference.verify.reference import Reference

pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed (extra export)")
pytest.importorskip("gguf", reason="the package gguf is not installed (extra export)")


@pytest.fixture(scope="module")
def request_for(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Request:
    """Two questions, the first about an image of the encoder's size."""
    file = io.BytesIO()
    Image.effect_noise((24, 24), 90).convert("RGB").save(file, "PNG")
    cases = [
        Case("image", (Turn("user", (ImageRef(content=file.getvalue()), "\nWhat is this?")),)),
        Case("text", (Turn("user", ("Say so.",)),)),
    ]
    reference = Reference(served.model)
    inputs = {case.name: reference.inputs(case) for case in cases}
    return Request(served.final, cases, cases, inputs, tmp_path_factory.mktemp("scratch"), 4)


def test_onnxruntime_gives_logits_and_answers_of_the_checkpoint(served: Served, request_for: Request):
    observed = load_engine("onnx").observe(request_for)
    assert observed.is_run
    reference = Reference(served.model)
    for case in request_for.cases:
        expected = reference.outputs(case)[LOGITS]
        assert torch.allclose(observed.outputs[case.name][LOGITS], expected, atol=1e-4)
        assert observed.answers[case.name] == reference.answer(case, 4)


def test_llama_cpp_counts_and_answers(served: Served, request_for: Request, tmp_path: Path):
    observed = load_engine("gguf").observe(replace(request_for, scratch=tmp_path))
    assert observed.is_run == (importlib.util.find_spec("xllamacpp") is not None)
    if not observed.is_run:
        pytest.skip("llama.cpp answers through the package xllamacpp, which is not installed")
    for case in request_for.cases:
        assert int(observed.outputs[case.name][NUM_IDS]) == request_for.inputs[case.name]["input_ids"].shape[1]
    reference = Reference(served.model)
    assert observed.answers["text"] == reference.answer(request_for.cases[1], 4)
