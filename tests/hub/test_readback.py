"""Exports are read back: names that their readers do not expect and outputs that are not ours leave nothing behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hub.test_exporting import KEYS, saved, weights
from tests.tiny_parts import Parts
from vlm.hub import exporting, readback
from vlm.hub.exporting import export_checkpoint
from vlm.hub.readback import find_differences, make_projector
from vlm.hub.targets import EXPORT_FORMATS

TOWER = {"llava": None, "llava-original": "my/clip"}


def export(folder: Path, form: str) -> list[str]:
    return export_checkpoint(str(folder / "ours"), folder / "theirs", form, vision_tower=TOWER[form])


def save_with_seen_transparency(parts: Parts, folder: Path, form: str, name: str, **options: Any) -> None:
    """Save a checkpoint that sees transparent images as the readers of a format do."""
    _, processor = saved(parts, folder, "clip", name, layer=-2, **options)
    processor.alpha_background = "white" if form == "llava" else "drop"
    processor.save_pretrained(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "ours" / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def as_after_zero3(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("visual_encoder.", "visual_encoder.vision_model."): value for name, value in state.items()}


@pytest.mark.parametrize("form", KEYS)
def test_names_that_a_former_version_saved_are_exported_rightly(parts: Parts, tmp_path: Path, form: str):
    save_with_seen_transparency(parts, tmp_path / "ours", form, "llama", template="v1")
    assert export(tmp_path, form) == []
    expected = weights(tmp_path / "theirs")
    rewrite(tmp_path, as_after_zero3)
    (tmp_path / "theirs").rename(tmp_path / "first")
    assert export(tmp_path, form) == []
    assert set(weights(tmp_path / "theirs")) == set(expected) == KEYS[form]
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "theirs").items())


@pytest.mark.parametrize("form", KEYS)
def test_a_copy_of_tied_embeddings_is_left_out(parts: Parts, tmp_path: Path, form: str):
    """ZeRO-1 and 2 left one in checkpoints."""
    save_with_seen_transparency(parts, tmp_path / "ours", form, "qwen2", template="chatml")
    embeddings = "language_model.model.embed_tokens.weight"
    rewrite(tmp_path, lambda state: {**state, "language_model.lm_head.weight": state[embeddings].clone()})
    assert export(tmp_path, form) == []
    assert not any("lm_head" in name for name in weights(tmp_path / "theirs"))


@pytest.mark.parametrize("form", KEYS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: {name: value for name, value in state.items() if "layer_norm1" not in name},
            "it lacks 4 weights",
        ),
        (lambda state: {**state, "connector.extra": torch.ones(1)}, "no place for 1 weights, such as connector.extra"),
        (lambda state: {**state, "connector.layers.0.bias": torch.ones(5)}, r"not \(5,\)|\(5,\)"),
    ],
    ids=["lacking", "surplus", "shape"],
)
def test_weights_that_are_not_the_models_are_refused(
    parts: Parts, tmp_path: Path, form: str, change: Callable[[Any], Any], said: str
):
    saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="v1")
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=said):
        export(tmp_path, form)
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


WRONG_PREFIXES = {
    "llava": (
        ("vision_tower.vision_model.vision_model.", "visual_encoder."),
        "LlavaForConditionalGeneration lacks 39 w",
    ),
    "llava-original": (("model.vision_tower.", "visual_encoder."), "CLIPVisionModel lacks 39 weights"),
}


@pytest.mark.parametrize("form", KEYS)
def test_names_that_the_reader_does_not_expect_are_refused(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
):
    """Before a weight is written."""
    saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="v1")
    target, (prefix, said) = EXPORT_FORMATS[form], WRONG_PREFIXES[form]
    wrong = target._replace(weight_prefixes=lambda kind: (prefix, *target.weight_prefixes(kind)))
    monkeypatch.setitem(EXPORT_FORMATS, form, wrong)
    monkeypatch.setattr(exporting, "_write_weights", lambda *given: pytest.fail("weights were written"))
    with pytest.raises(ValueError, match=said):
        export(tmp_path, form)
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


CHANGES = {"llava": {"vision_feature_layer": -2}, "llava-original": {"mm_vision_select_layer": 1}}


@pytest.mark.parametrize("form", KEYS)
def test_outputs_that_are_not_ours_are_refused(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
):
    """All names are there; what is read is another layer."""
    saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="v1")
    target = EXPORT_FORMATS[form]
    wrong = target._replace(make_config=lambda *given: target.make_config(*given) | CHANGES[form])
    monkeypatch.setitem(EXPORT_FORMATS, form, wrong)
    with pytest.raises(ValueError, match=r"was not exported: the files written have .* that differ by"):
        export(tmp_path, form)
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_without_memory_for_the_weights_that_is_said(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="v1")
    monkeypatch.setattr(readback, "read_available_memory", lambda: 1000)
    (said,) = export(tmp_path, "llava")
    assert said.startswith("names and shapes of the weights were checked, outputs were not compared: the weights need")
    assert (tmp_path / "theirs" / "model.safetensors").is_file()


def test_differences_of_outputs():
    ours = torch.arange(1.0, 7.0)
    assert list(find_differences({"logits": ours}, {"logits": ours + 1e-6})) == []
    assert list(find_differences({"logits": ours.bfloat16()}, {"logits": ours.bfloat16() * 1.01})) == []
    (wrong,) = find_differences({"logits": ours}, {"logits": ours * 1.01})
    assert wrong == "logits that differ by 0.01 of their norm"
    (nan,) = find_differences({"logits": ours}, {"logits": ours * float("nan")})
    assert "differ by nan" in nan
    (shape,) = find_differences({"logits": ours}, {"logits": ours[:2]})
    assert shape == "logits of shape (2,) instead of (6,)"


@pytest.mark.parametrize(("kind", "names"), [("identity", 0), ("linear", 2), ("mlp1x_gelu", 2), ("mlp3x_gelu", 6)])
def test_projectors_of_the_original(kind: str, names: int):
    projector = make_projector({"mm_projector_type": kind, "mm_hidden_size": 4}, 6)
    assert len(projector.state_dict()) == names
    assert projector(torch.ones(1, 4)).shape == (1, 4 if kind == "identity" else 6)


def test_infinite_outputs_of_both_are_equal():
    """Logits of half precision may be too large for it; the comparison is of the others."""
    ours = torch.tensor([1.0, 2.0, torch.inf, -torch.inf], dtype=torch.float16)
    assert list(find_differences({"logits": ours}, {"logits": ours.clone()})) == []
    largest = torch.tensor([1.0, 2.0, 65504, -65504], dtype=torch.float16)
    assert list(find_differences({"logits": ours}, {"logits": largest})) == []
    for wrong in (torch.tensor([1.0, 3.0, torch.inf, -torch.inf]), torch.tensor([1.0, 2.0, -torch.inf, torch.inf])):
        (problem,) = find_differences({"logits": ours}, {"logits": wrong.half()})
        assert problem.startswith("logits that differ by ")
    (problem,) = find_differences({"logits": ours * torch.nan}, {"logits": ours * torch.nan})
    assert problem == "logits that are not numbers (NaN) already in the checkpoint"


@pytest.mark.parametrize(("form", "background"), [("llava", "black"), ("llava", "drop"), ("llava-original", "white")])
def test_transparency_that_a_format_cannot_express_is_said(parts: Parts, tmp_path: Path, form: str, background: str):
    _, processor = saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="v1")
    processor.alpha_background = background
    processor.save_pretrained(tmp_path / "ours")
    (said,) = export(tmp_path, form)
    assert said.startswith(f"transparent images look different: dataset.alpha_background={background} has no place")
