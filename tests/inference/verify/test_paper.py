"""What vLLM and SGLang read, checked on paper: exports fit, and what does not is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.hub.test_exporting import saved
from tests.hub.tiles import LIKE, ours
from tests.inference.verify.conftest import Served
from tests.tiny_parts import Parts
from vlm.hub.exporting import export_checkpoint
from vlm.inference.verify.engines import Request, load_engine
from vlm.inference.verify.paper import check_for_sglang, check_for_vllm, read_composed_config, rename_for_vllm
from vlm.inference.verify.served_forms import differences_from_fresh


def test_an_export_fits_vllm(served: Served):
    assert list(check_for_vllm(served.export, read_composed_config(served.final))) == []
    assert rename_for_vllm("model.language_model.norm.weight") == "language_model.model.norm.weight"
    assert rename_for_vllm("vision_tower.vision_model.a") == "vision_tower.vision_model.a"


def change(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        edit(values)
        (folder / name).write_text(json.dumps(values))

    return write


def rename(first: str, second: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state = {name.replace(first, second): tensor for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return write


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: None, None),
        (
            change("config.json", lambda values: values["text_config"]["rope_parameters"].update(rope_theta=77.0)),
            "config.json: text_config.rope_parameters.rope_theta is 77.0, expected 10000.0",
        ),
        (
            change("processor_config.json", lambda values: values["image_processor"].update(resample=0)),
            "processor_config.json: image_processor.resample is 0, expected 3",
        ),
        (change("generation_config.json", lambda values: values.update(eos_token_id=[5])), "eos_token_id is [5]"),
        (lambda folder: (folder / "chat_template.jinja").write_text("Hi"), "chat_template.jinja: text is 'Hi'"),
        (lambda folder: scale_weight(folder, "multi_modal_projector.linear_1.bias"), "1 weights are not the"),
    ],
)
def test_an_export_that_is_not_the_checkpoints_is_named(
    served: Served, tmp_path: Path, edit: Callable[[Path], object], said: str | None
):
    """What fits the engine but is another model than was trained."""
    shutil.copytree(served.export, tmp_path / "export")
    edit(tmp_path / "export")
    request = Request(served.final, [], [], {}, tmp_path, 1, export=tmp_path / "export")
    found = list(differences_from_fresh(request, "llava"))
    assert found == [] if said is None else len(found) == 1 and said in found[0]


def scale_weight(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, name: state[name] * 1.001}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("engine", ["vllm", "gguf", "onnx"])
def test_a_folder_of_another_format_is_refused(served: Served, tmp_path: Path, engine: str):
    """Also the checkpoint itself, whose configuration names no class of LLaVA's."""
    (tmp_path / "config.json").write_text('{"model_type": "vlm"}')
    request = Request(served.final, [], [], {}, tmp_path, 1, export=tmp_path)
    if engine == "vllm":
        assert "only LLaVA's classes" in next(check_for_vllm(tmp_path, None))
        return
    with pytest.raises(
        ValueError, match=r"--export .*: it contains no .*; create it with vlm export CHECKPOINT FOLDER"
    ):
        load_engine(engine).observe(request)


UNFIT = {
    "class": (change("config.json", lambda values: values.update(architectures=["Other"])), "only LLaVA's classes"),
    "layer": (change("config.json", lambda values: values.update(vision_feature_layer=-9)), "vision_feature_layer=-9"),
    "strategy": (
        change("config.json", lambda values: values.update(vision_feature_select_strategy="full")),
        "prompts would have another number of image tokens",
    ),
    "activation": (change("config.json", lambda values: values.update(projector_hidden_act="mish")), "hidden_act=mish"),
    "text": (
        change("config.json", lambda values: values["text_config"].update(architectures=["OtherForCausalLM"])),
        "text_config.architectures",
    ),
    "image token": (change("config.json", lambda values: values.update(image_token_index=7)), "has the id 320, not 7"),
    "image size": (
        change("processor_config.json", lambda values: values["image_processor"].update(
            size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})),
        "vLLM takes the encoder's, 24",
    ),
    "names": (rename("vision_tower.vision_model.", "vision_tower."), "match no module of vLLM, such as vision_tower."),
    "weights": (rename("linear_1.bias", "linear_1.offset"), "lacks 1 weights"),
    "template": (lambda folder: (folder / "chat_template.jinja").unlink(), "there is no chat template"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_vllm_would_not_serve_is_named(served: Served, tmp_path: Path, name: str):
    edit, said = UNFIT[name]
    shutil.copytree(served.export, tmp_path / "export")
    edit(tmp_path / "export")
    problems = list(check_for_vllm(tmp_path / "export", read_composed_config(served.final)))
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("kind", "said"), [("llava_next", None), ("llava_onevision", "vision_aspect_ratio=anyres_max_2")]
)
def test_tiles_in_vllm(parts: Parts, tmp_path: Path, kind: str, said: str | None):
    """vLLM 0.33 counts LLaVA-OneVision's tokens for nine tiles, whatever the configuration says."""
    ours(parts, tmp_path / "final", ("siglip", "qwen2"), LIKE[kind])
    export_checkpoint(str(tmp_path / "final"), tmp_path / "export", "llava")
    problems = list(check_for_vllm(tmp_path / "export", read_composed_config(tmp_path / "final")))
    assert [problem.partition(":")[0] for problem in problems] == ([] if said is None else [said])


SGLANG_UNFIT = {
    "tower": (change("config.json", lambda values: values.update(mm_vision_tower="a/tower")), "mm_vision_tower=a"),
    "feature": (
        change("config.json", lambda values: values.update(mm_vision_select_feature="cls_patch")), "without CLS",
    ),
    "projector": (rename("mm_projector.2.", "mm_projector.4."), "a projector of two layers with biases"),
    "class": (change("config.json", lambda values: values.update(architectures=["Other"])), "only LlavaLlama"),
    "newline": (change("config.json", lambda values: values.update(mm_patch_merge_type="spatial_unpad")), "unpad"),
}  # fmt: skip


def test_what_sglang_reads(parts: Parts, tmp_path: Path):
    saved(parts, tmp_path / "final", "clip", "llama", layer=-2, template="v1")
    export_checkpoint(str(tmp_path / "final"), tmp_path / "export", "llava-original", vision_tower="my/clip")
    config = read_composed_config(tmp_path / "final")
    assert list(check_for_sglang(tmp_path / "export", config)) == []
    for name, (edit, said) in SGLANG_UNFIT.items():
        shutil.copytree(tmp_path / "export", tmp_path / name)
        edit(tmp_path / name)
        problems = list(check_for_sglang(tmp_path / name, config))
        assert any(said in problem for problem in problems), (name, problems)
