"""Configurations of checkpoints ask for no code and no files elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import Parts
from vlm.assembly.family import read_config
from vlm.assembly.foreign_config import (
    ForeignCodeError,
    check_adapter_values,
    check_config_values,
    check_reference,
    drop_flash_attention,
    load_config,
)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"_attn_implementation": "owner/kernel"}, "_attn_implementation=owner/kernel"),
        ({"attn_implementation": "kernels-community/flash-attn@main:fn"}, "attn_implementation="),
        ({"text_config": {"_attn_implementation": "paged|owner/kernel"}}, "text_config._attn_implementation="),
        ({"body_config": {"vision_config": {"_attn_implementation_internal": "a/b"}}}, "body_config.vision_config."),
        ({"attn_implementation": {"": "sdpa", "text_config": "a/b"}}, "attn_implementation="),
        ({"experts_implementation": "a/b"}, "experts_implementation="),
        ({"use_kernels": True}, "use_kernels=True"),
        ({"encoders": [{"kernel_config": {"a": "b"}}]}, "encoders.0.kernel_config="),
        ({"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}, "architecture=hf-hub:a/b"),
        ({"model_type": "timm_wrapper", "architecture": "local-dir:/x"}, "architecture="),
        ({"vision_config": {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "/x"}}}, "checkpoint_path"),
        ({"model_type": "timm_wrapper", "model_args": {"pretrained_cfg_overlay": {"file": "/x"}}}, "model_args."),
        ({"model_type": "timm_backbone", "backbone": "hf_hub:a/b"}, "backbone=hf_hub:a/b"),
    ],
)
def test_what_leads_elsewhere_is_refused_by_its_key(values: dict[str, Any], key: str):
    with pytest.raises(ForeignCodeError) as refused:
        check_config_values(values, "a checkpoint")
    assert str(refused.value).startswith("a checkpoint: its config.json has ")
    assert key in str(refused.value)


def test_what_is_part_of_transformers_is_taken():
    for name in ("eager", "sdpa", "flash_attention_2", "flex_attention", None):
        check_config_values({"_attn_implementation": name, "text_config": {"attn_implementation": name}}, "x")
    check_config_values({"model_type": "timm_wrapper", "architecture": "vit_base_patch16_224.dino"}, "x")
    check_config_values({"model_type": "timm_wrapper", "model_args": {"dynamic_img_size": True, "depth": 3}}, "x")


def test_a_configuration_is_looked_at_before_it_is_made(parts: Parts, tmp_path: Path):
    parts.model()[0].config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["_attn_implementation"] = "owner/kernel"
    file.write_text(json.dumps(values))
    with pytest.raises(ForeignCodeError, match=r"text_config\._attn_implementation=owner/kernel, which would load"):
        read_config(str(tmp_path), "x")


def test_flash_attention_is_left_to_the_caller(parts: Parts, tmp_path: Path):
    """Without the library, transformers would fetch a kernel in its place."""
    parts.model()[0].config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["attn_implementation"] = "flash_attention_2"
    file.write_text(json.dumps(values))
    config: Any = load_config(tmp_path, "x")
    assert config.text_config._attn_implementation is None
    config.vision_config._attn_implementation = "eager"
    drop_flash_attention(config)
    assert config.vision_config._attn_implementation == "eager"


@pytest.mark.parametrize("reference", ["owner/name--file.Class", "../file.Class", "/etc/file.Class", "a--b.Class", ""])
def test_a_class_of_another_repository_does_not_travel(reference: str):
    with pytest.raises(ForeignCodeError, match="is not a class of a file that is saved with the checkpoint"):
        check_reference(reference, "x")
    assert check_reference("user_connector.Mine", "x") == "user_connector.Mine"


def test_an_adapter_names_no_module():
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    check_adapter_values(LoraConfig(r=4, target_modules=["q"], use_dora=True).to_dict(), defaults, "x")
    hostile: list[dict[str, Any]] = [
        {"megatron_config": {"a": 1}}, {"megatron_core": "evil"}, {"auto_mapping": {"parent_library": "evil"}},
        {"corda_config": {"cache_file": "/x"}}, {"something_new": "evil"},
    ]  # fmt: skip
    for values in hostile:
        with pytest.raises(ForeignCodeError, match=r"adapter_config.json has \w+=.*, which is not allowed"):
            check_adapter_values({**defaults, **values}, defaults, "x")
