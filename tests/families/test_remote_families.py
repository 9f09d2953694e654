"""Models whose code is in their own repository are families where their code names the parts as transformers' does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from tests.families.tiny_families import save_family
from vlm.assembly.checkpoint import CheckpointKind, open_checkpoint
from vlm.assembly.family import load_family_config
from vlm.families.meta_model import get_auto_class
from vlm.families.parts import get_part_names

CODE = """\
from transformers import LlavaConfig, LlavaForConditionalGeneration


class SomeConfig(LlavaConfig):
    model_type = "some_vlm"


class SomeModel(LlavaForConditionalGeneration):
    config_class = SomeConfig
"""
AUTO_MAP = {"AutoConfig": "some.SomeConfig", "AutoModelForImageTextToText": "some.SomeModel"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny LLaVA under the name of a type that transformers does not have."""
    save_family("llava-interleave", tmp_path)
    state = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "some.py").write_text(CODE)
    return tmp_path


def set_config(folder: Path, auto_map: dict[str, str]) -> None:
    """Change the configuration to that of a repository with code."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "some_vlm", "architectures": ["SomeModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_with_its_own_code_is_a_family(folder: Path):
    set_config(folder, AUTO_MAP)
    checkpoint = open_checkpoint(folder, trust_remote_code=True)
    assert checkpoint.kind is CheckpointKind.FAMILY
    assert get_auto_class(checkpoint.config) is AutoModelForImageTextToText
    names = get_part_names(checkpoint.config)
    model = checkpoint.load_model(torch.float32)
    assert type(model).__name__ == "SomeModel"
    assert {names.part_of(name) for name, _ in model.named_parameters()} == {
        "visual_encoder", "connector", "language_model"
    }  # fmt: skip
    processor = checkpoint.load_processor()
    assert processor.image_token == "<image>"


def test_what_its_repository_lacks_is_told(folder: Path):
    set_config(folder, {"AutoConfig": "some.SomeConfig", "AutoModel": "some.SomeModel"})
    with pytest.raises(
        ValueError, match=r"model_type=some_vlm: its config\.json has no auto_map entry for AutoModelFor"
    ):
        load_family_config(str(folder), "model.hf_name", trust_remote_code=True)
