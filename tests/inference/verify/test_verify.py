"""What is served is compared with what was trained: every way of breaking an export is caught, and its stage named."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.tiny_families import save_family
from tests.hub.tiles import LIKE, ours
from tests.inference.verify.conftest import Served
from tests.tiny_parts import Parts
from vlm.hub.certificates import Certificate
from vlm.hub.exporting import export_checkpoint
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.verify import installed_transformers
from vlm.inference.verify.cases import make_cases
from vlm.inference.verify.engines import ENGINE_MODULES, Observation, load_engine
from vlm.inference.verify.installed_transformers import InstalledTransformers
from vlm.inference.verify.verify import Settings, verify


def certify(served: Served, export: Path, questions: int = 2) -> Certificate:
    return verify(served.final, served.model, InstalledTransformers(), make_cases(questions), Settings(3, export))


@pytest.mark.usefixtures("read_here")
def test_an_export_is_what_was_trained(served: Served):
    certificate = certify(served, served.export, 10)
    assert certificate.difference is None
    assert [(stage.stage, stage.cases) for stage in certificate.stages] == [("pixels", 9), ("ids", 10), ("logits", 10)]
    assert [stage.largest for stage in certificate.stages][:2] == [0, 0]
    assert certificate.stages[2].largest < 1e-5
    assert (certificate.equal_answers, certificate.tied_answers, certificate.answers) == (10, 0, 10)
    assert certificate.is_run
    assert certificate.engine.startswith("transformers 5.")
    assert certificate.dtype == "float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("read_here")
def test_half_precision_is_no_difference(served: Served, dtype: torch.dtype):
    halved = VisionLanguageModel(copy.deepcopy(served.model.model).to(dtype), served.model.processor)
    certificate = certify(served._replace(model=halved), served.export, 4)
    assert certificate.difference is None
    assert certificate.dtype == str(dtype).removeprefix("torch.")
    assert certificate.equal_answers + certificate.tied_answers == 4


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        changed = {name: tensor.contiguous() for name, tensor in (state | change(state)).items()}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})

    return edit


def swap(first: str, second: str) -> Callable[[Path], None]:
    """Exchange all weights under two prefixes."""

    def exchanged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pairs = [(name, name.replace(first, second)) for name in state if first in name]
        assert pairs
        return {a: state[b].clone() for a, b in pairs} | {b: state[a].clone() for a, b in pairs}

    return edit_weights(exchanged)


def transpose(name: str) -> Callable[[Path], None]:
    return edit_weights(lambda state: {name: state[name].T.clone()})


def edit_template(change: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "chat_template.jinja"
        text = file.read_text()
        assert change(text) != text
        file.write_text(change(text))

    return edit


def image_processor(**settings: object) -> Callable[[Path], None]:
    return edit_json("processor_config.json", lambda values: values["image_processor"].update(settings))


TEXT = "language_model.model.layers."
QUERY, DOWN = f"{TEXT}1.self_attn.q_proj.weight", f"{TEXT}1.mlp.down_proj.weight"
BROKEN = {
    "mean": (image_processor(image_mean=[0.5, 0.5, 0.5]), "pixels differ by up to"),
    "std": (image_processor(image_std=[0.3, 0.3, 0.3]), "pixels differ by up to"),
    "padding": (image_processor(do_pad=False), "pixels differ by up to"),
    "resampling": (image_processor(resample=0), "pixels differ by up to"),
    "template": (edit_template(lambda text: text.replace("<|im_start|>", "<|user|>")), "ids differ from token 0 on"),
    "line break": (edit_template(lambda text: text.replace("turn.text + '\\n'", "turn.text")), "ids differ from token"),
    "system prompt": (edit_template(lambda text: text + "!"), "tokens instead of"),
    "encoder": (
        swap("vision_tower.vision_model.encoder.layers.0.", "vision_tower.vision_model.encoder.layers.1."),
        "the outputs of visual encoder layer 1 are the first that differ",
    ),
    "feature layer": (
        edit_json("config.json", lambda values: values.update(vision_feature_layer=-2)),
        "the outputs of image features are the first that differ",
    ),
    "projector": (
        swap("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
        "the outputs of connector are the first that differ",
    ),
    "activation": (
        edit_json("config.json", lambda values: values.update(projector_hidden_act="relu")),
        "the outputs of connector are the first that differ",
    ),
    "transposed": (
        transpose(QUERY),
        "the outputs of language model layer 2 are the first that differ",
    ),
    "rotary base": (
        edit_json("config.json", lambda values: values["text_config"]["rope_parameters"].update(rope_theta=100.0)),
        "the outputs of language model layer 1 are the first that differ",
    ),
    "gelu by tanh": (
        edit_json("config.json", lambda values: values.update(projector_hidden_act="gelu_pytorch_tanh")),
        "the outputs of connector are the first that differ",
    ),
    "rounded": (
        edit_weights(lambda state: {DOWN: state[DOWN].bfloat16().float()}),
        "the outputs of language model layer 2 are the first that differ",
    ),
    "size of images": (
        image_processor(crop_size={"height": 20, "width": 20}, size={"height": 20, "width": 20}),
        "pixels have the shape (1, 3, 20, 20) instead of (1, 3, 24, 24)",
    ),
    "image token": (
        edit_json("config.json", lambda values: values.update(image_token_index=300)),
        "the model fails at inputs that are those of training: ValueError: Image features",
    ),
    "ids that end an answer": (
        edit_json("generation_config.json", lambda values: values.update(eos_token_id=5)),
        "an answer ends at the ids [5] instead of [",
    ),
    "vocabulary head": (
        edit_weights(lambda state: {"language_model.lm_head.weight": state["language_model.lm_head.weight"].flip(0)}),
        "logits differ by",
    ),
    "end of replies": (
        edit_json("generation_config.json", lambda values: values.update(max_length=1, suppress_tokens=[*range(300)])),
        "answers differ: the answer is",
    ),
}
"""How an export is broken, and what is said of it."""


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.usefixtures("read_here")
def test_a_broken_export_is_caught_and_its_stage_named(served: Served, tmp_path: Path, name: str):
    break_it, said = BROKEN[name]
    shutil.copytree(served.export, tmp_path / "broken")
    break_it(tmp_path / "broken")
    certificate = certify(served, tmp_path / "broken")
    assert certificate.difference is not None
    assert said in certificate.difference
    assert re.search(r"\(question (made-00\d|any)\)", certificate.difference)
    assert len(certificate.difference) < 400
    assert "\n" not in certificate.difference


@pytest.mark.parametrize("kind", LIKE)
@pytest.mark.usefixtures("read_here")
def test_images_in_tiles_and_a_lost_newline(parts: Parts, tmp_path: Path, kind: str):
    model, processor = ours(parts, tmp_path / "final", ("clip", "qwen2"), LIKE[kind])
    export_checkpoint(str(tmp_path / "final"), tmp_path / "export", "llava")
    tiled = Served(tmp_path / "final", tmp_path / "export", VisionLanguageModel(model, processor))
    certificate = certify(tiled, tiled.export, 7)  # of one image, of none and of two
    assert certificate.difference is None
    assert certificate.stages[0].cases == 6
    edit_weights(lambda state: {"image_newline": torch.zeros_like(state["image_newline"])})(tiled.export)
    said = str(certify(tiled, tiled.export, 1).difference)
    assert said.startswith("the outputs of language model layer 1 are the first that differ")


@pytest.mark.parametrize("name", ["qwen2-vl", "llava-next"])
@pytest.mark.usefixtures("read_here")
def test_a_family_is_read_as_it_is(tmp_path: Path, name: str):
    """Its own template writes no line break behind an image, and its own processor pads images to equal tiles."""
    save_family(name, tmp_path / name)
    model = VisionLanguageModel.load(tmp_path / name, device="cpu", dtype="float32")
    certificate = verify(tmp_path / name, model, InstalledTransformers(), make_cases(7), Settings(2))
    assert certificate.difference is None
    assert certificate.answers == 7


class Told:
    """An engine that gives what a test tells it."""

    def __init__(self, observation: Observation):
        self.observation = observation

    def observe(self, request: object) -> Observation:
        return self.observation

    def trace(self, request: object, case: object) -> dict[str, torch.Tensor]:
        return {}


def test_what_does_not_fit_on_paper_is_the_difference(served: Served):
    told = Told(Observation("an engine", is_run=False, problems=["no place for a", "no place for b"], notes=["seen"]))
    certificate = verify(served.final, served.model, told, make_cases(1), Settings())
    assert certificate.difference == "no place for a; no place for b"
    assert (certificate.is_run, certificate.answers, certificate.notes) == (False, 0, ["seen"])


def test_logits_without_layers_are_named_as_such(served: Served):
    told = Told(Observation("an engine", {"made-000": {"logits": torch.zeros(16, 384)}}))
    certificate = verify(served.final, served.model, told, make_cases(1), Settings())
    assert str(certificate.difference).startswith(
        "logits differ by 1 of their size (allowed: 0.0001) (question made-000"
    )


def test_questions_that_the_template_or_the_positions_refuse_are_left_out(served: Served):
    told = Told(Observation("an engine"))
    with pytest.raises(ValueError, match="an engine gave nothing that could be compared"):
        verify(served.final, served.model, told, make_cases(1), Settings())
    told = Told(Observation("an engine", is_run=False))
    with pytest.raises(ValueError, match="none of 2 questions can be asked: the prompt has"):
        verify(served.final, served.model, told, make_cases(2), Settings(max_new_tokens=500))
    certificate = verify(served.final, served.model, told, make_cases(4), Settings(max_new_tokens=478))
    assert certificate.notes[0].startswith("1 of 4 questions were left out: the prompt has")


@pytest.mark.parametrize("name", ENGINE_MODULES)
def test_engines_are_found_by_their_names(name: str):
    engine = load_engine(name)
    assert callable(engine.observe)
    assert callable(engine.trace)
    assert load_engine("transformers") is installed_transformers.ENGINE
