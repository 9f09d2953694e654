"""ONNX: the graphs give features, logits and answers of the model, for several rows, with and without images."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.command_line import refusal
from tests.hub.test_exporting import saved
from tests.tiny_parts import Parts, picture
from vlm.cli.main import main
from vlm.hub.exporting import export_checkpoint
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.verify.cases import make_cases
from vlm.inference.verify.engines import LOGITS, Request, load_engine
from vlm.inference.verify.reference import Reference

pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed (extra export)")
pytest.importorskip("onnxscript", reason="the package onnxscript is not installed (extra export)")

from vlm.hub.onnx import exporting
from vlm.hub.onnx.session import OnnxModel

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"


@pytest.fixture(scope="module")
def exported(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The folder of an export, the model and its processor."""
    root = tmp_path_factory.mktemp("onnx")
    model, processor = saved(parts, root / "ours", "clip", "llama", layer=-2, template="chatml")
    main(["export", str(root / "ours"), str(root / "onnx"), "--format", "onnx"])
    return root / "onnx", model, processor


def test_files(exported: tuple[Path, Any, Any]):
    folder, _, _ = exported
    assert sorted(file.name for file in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "decoder_model_merged.onnx", "embed_tokens.onnx",
        "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
        "vision_encoder.onnx",
    ]  # fmt: skip
    graphs = OnnxModel(folder, 320)
    assert [entry.name for entry in graphs.decoder.get_inputs()][:5] == [
        "inputs_embeds", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert [entry.name for entry in graphs.decoder.get_outputs()][:2] == ["logits", "present.0.key"]


def test_rows_of_different_lengths_and_numbers_of_images(exported: tuple[Path, Any, Any]):
    """Padded on the left, as for generation."""
    folder, model, processor = exported
    talks = ["<image>\nWhat is this?", "Say so.", "<image><image>\nAnd these?"]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": talk}], add_generation_prompt=True) for talk in talks
    ]
    inputs = processor(images=[picture(seed) for seed in range(3)], text=texts)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    graphs = OnnxModel(folder, processor.image_token_id)
    tokens = graphs.generate(arrays["input_ids"], arrays["attention_mask"], arrays["pixel_values"], 6)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens.tolist() == expected[:, -6:].tolist()
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
    assert np.allclose(graphs.image_features(arrays["pixel_values"]), features.numpy(), atol=1e-5)


def test_the_pages_script_answers(exported: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]):  # fmt: skip
    """With onnxruntime, numpy, tokenizers and Pillow alone."""
    folder, model, processor = exported
    script = re.search(r"```python\n(# answer\.py.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert script is not None
    assert len(script[1].splitlines()) <= 30
    assert set(re.findall(r"^(?:from|import) (\w+)", script[1], re.MULTILINE)) <= {
        "json", "sys", "pathlib", "numpy", "onnxruntime", "PIL", "tokenizers",
    }  # fmt: skip
    (tmp_path / "answer.py").write_text(script[1])
    picture(size=(24, 24)).save(tmp_path / "image.png")
    prompt = processor.apply_chat_template([{"role": "user", "content": "<image>\nWhat is this?"}],
                                           add_generation_prompt=True)  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["answer.py", str(folder), str(tmp_path / "image.png"), prompt])
    runpy.run_path(str(tmp_path / "answer.py"), run_name="__main__")
    inputs = processor(images=[picture(size=(24, 24))], text=prompt)
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_the_verifier_gives_the_graphs_what_training_gives_the_model(exported: tuple[Path, Any, Any], tmp_path: Path):
    folder, model, processor = exported
    cases = make_cases(4)
    reference = Reference(VisionLanguageModel(model, processor))
    inputs = {case.name: reference.inputs(case) for case in cases}
    request = Request(folder, cases, cases, inputs, tmp_path, max_new_tokens=4, export=folder)
    observed = load_engine("onnx").observe(request)
    for case in cases:
        expected = reference.outputs(case)[LOGITS]
        assert torch.allclose(observed.outputs[case.name][LOGITS], expected, atol=1e-4)
        assert observed.answers[case.name] == reference.answer(case, 4)


def test_what_has_no_graph_is_refused(parts: Parts, tmp_path: Path):
    saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="chatml")
    said = refusal("export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "onnx", "--dtype", "float16")
    assert "--dtype=float16: --format onnx is float32" in said
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_wrong_graphs_are_refused(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  exported: tuple[Path, Any, Any]):  # fmt: skip
    """Those of another model, which read and answer all the same."""
    saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="chatml", seed=1)

    def copy(model: Any, folder: Path, shape: object) -> None:
        for file in exported[0].glob("*.onnx"):
            (folder / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(exporting, "write_graphs", copy)
    said = refusal("export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "onnx")
    assert "was not exported: the graphs have image features that differ by" in said
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("dinov2", "qwen2"), {"connector": "resampler", "options": {"num_queries": 4, "num_heads": 2}}),
        (("siglip", "gemma3"), {"connector": "pixel_shuffle", "options": {"factor": 3}}),
        (("timm_vit", "phi3"), {"connector": "ldp"}),
        (("clip", "mistral"), {"extra_encoders": {"siglip": {}}, "image_size": 24}),
    ],
    ids=str,
)
def test_any_composition_has_graphs(parts: Parts, tmp_path: Path, names: tuple, options: dict):
    """The export compares features, logits and an answer itself."""
    saved(parts, tmp_path / "ours", *names, template="chatml", **options)
    assert export_checkpoint(str(tmp_path / "ours"), tmp_path / "onnx", "onnx") == []
