"""A complete model is saved under one set of names, however it was loaded and sharded, and says where it ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from tests.families.tiny_families import save_family
from tests.models.test_prediction_checkpoints import KIND, YES
from tests.tiny_parts import CHAT_TEMPLATES, Parts
from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.compose import build_model, compose
from vlm.assembly.saving import reply_end_settings, save_complete, set_reply_ends, share_tied_tensors
from vlm.config.model_schema import AnyResConfig
from vlm.models import VLMForPrediction, VLMPredictionConfig


def names(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def load(folder: Path) -> PreTrainedModel:
    return open_checkpoint(folder).load_model()


def load_as_zero3_does(folder: Path) -> PreTrainedModel:
    """Its loader leaves every renaming it knows in the model, those that renamed nothing too."""
    model: Any = load(folder)
    conversions = get_model_conversion_mapping(model)
    for name in names(folder):
        rename_source_key(name, conversions, [], model.base_model_prefix, model.state_dict())
    model._weight_conversions = conversions
    return model


def anyres(parts: Parts) -> PreTrainedModel:
    recipe = parts.recipe("clip", "llama", layer=-2)
    recipe.anyres = AnyResConfig([[1, 2], [2, 1]])
    config, processor = compose(recipe, None, None)
    return build_model(recipe, config, processor, torch.float32, seed=0)


def with_heads(body: PreTrainedModel) -> PreTrainedModel:
    return VLMForPrediction(VLMPredictionConfig(body_config=body.config, heads=[YES, KIND]), body)


def several(parts: Parts) -> PreTrainedModel:
    return parts.model("clip", "llama", layer=-2, image_size=24, extra_encoders={"siglip": {"feature_layer": -1}})[0]


MODELS = {
    "clip, tied embeddings": lambda parts: parts.model("clip", "tied_llama", layer=-2)[0],
    "siglip": lambda parts: parts.model("siglip", "qwen3", layer=-1)[0],
    "timm": lambda parts: parts.model("timm_convnet", "gemma3")[0],
    "several encoders": several,
    "tiles": anyres,
    "heads": lambda parts: with_heads(parts.model("clip", "tied_llama", layer=-2)[0]),
    "heads on several encoders": lambda parts: with_heads(several(parts)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_ours_has_its_own_names(parts: Parts, tmp_path: Path, kind: str):
    """As made, loaded and saved again, sharded by ZeRO-3, copied by ZeRO-1 and 2, and out of names of an older day."""
    model = MODELS[kind](parts)
    save_complete(model, tmp_path / "made")
    own = names(tmp_path / "made")
    assert own <= set(model.state_dict())
    save_complete(load(tmp_path / "made"), tmp_path / "again")
    copied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_complete(model, tmp_path / "copied", copied)
    sharded: Any = load_as_zero3_does(tmp_path / "made")
    sharded.save_pretrained(tmp_path / "former")  # as before `save_complete`
    save_complete(sharded, tmp_path / "sharded")
    save_complete(load(tmp_path / "former"), tmp_path / "trained on")
    for folder in ("again", "copied", "sharded", "trained on"):
        assert names(tmp_path / folder) == own, folder
        for name, tensor in load_file(tmp_path / folder / "model.safetensors").items():
            assert torch.equal(tensor, load_file(tmp_path / "made" / "model.safetensors")[name])


def test_former_names_were_others(parts: Parts, tmp_path: Path):
    """Else the test above would show nothing."""
    save_complete(parts.model("clip", "llama", layer=-2)[0], tmp_path / "made")
    load_as_zero3_does(tmp_path / "made").save_pretrained(tmp_path / "former")
    assert "visual_encoder.vision_model.pre_layrnorm.weight" in names(tmp_path / "former")


@pytest.mark.parametrize(
    "family", ["llava-1.5", "llava-onevision", "qwen2-vl", "qwen3-vl", "internvl", "gemma3", "mllama"]
)
def test_a_family_keeps_the_names_that_it_came_with(tmp_path: Path, family: str):
    """With the prefixes of the Hub's files or without, sharded or not; after ZeRO-3 they were named otherwise once."""
    save_family(family, tmp_path / "base")
    tower = "vision_tower." if family in ("llava-1.5", "llava-onevision") else None
    weights = load_file(tmp_path / "base" / "model.safetensors")
    if tower is not None:  # as on the Hub
        weights = {name.replace(tower, f"{tower}vision_model."): tensor for name, tensor in weights.items()}
        save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    save_complete(load(tmp_path / "base"), tmp_path / "again")
    sharded = load_as_zero3_does(tmp_path / "base")
    sharded.save_pretrained(tmp_path / "former")
    save_complete(sharded, tmp_path / "sharded")
    save_complete(load(tmp_path / "former"), tmp_path / "trained on")
    assert names(tmp_path / "again") == names(tmp_path / "sharded") == set(weights)
    assert not any("model.model.model" in name for name in names(tmp_path / "trained on"))
    if tower is not None:
        assert names(tmp_path / "trained on") == set(weights)
    state, expected = load(tmp_path / "sharded").state_dict(), load(tmp_path / "base").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_tied_copies_become_one_tensor(parts: Parts):
    model = parts.model("clip", "tied_llama", layer=-2)[0]
    state = share_tied_tensors(model, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert state["language_model.lm_head.weight"] is state["language_model.model.embed_tokens.weight"]
    assert len({id(tensor) for tensor in state.values()}) == len(state) - 1


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_what_ends_a_reply(parts: Parts, template: str):
    """The base's ids, the tokenizer's EOS, and the token behind a reply, where it is one; white space is none."""
    model, processor = parts.model("clip", "llama", layer=-2)
    about = CHAT_TEMPLATES[template]
    processor.chat_template = about.text
    settings: Any = model.generation_config
    settings.eos_token_id = 7
    set_reply_ends(model, processor)
    ends = {7, processor.tokenizer.eos_token_id}
    if about.end.strip() and about.end != "</s>":  # for which templates write the tokenizer's EOS
        ends.add(processor.tokenizer.convert_tokens_to_ids(about.end))
    assert settings.eos_token_id == sorted(ends)
    assert settings.pad_token_id == processor.tokenizer.pad_token_id
    assert reply_end_settings(settings.eos_token_id, None, processor)["eos_token_id"] == sorted(ends)


def test_a_family_says_where_it_ends(tmp_path: Path):
    save_family("qwen2-vl", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model: Any = checkpoint.load_model()
    processor = checkpoint.load_processor("chatml")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    processor = type(processor)(processor.native, processor.family, processor.chat_template)
    model.generation_config.eos_token_id = [3]
    set_reply_ends(model, processor)
    ends = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", processor.tokenizer.eos_token])
    assert model.generation_config.eos_token_id == sorted({3, *ends})


def test_sampling_flags_without_effect_are_not_saved(parts: Parts, tmp_path: Path):
    """transformers refuses to save them once settings have changed, which would lose a trained model."""
    model, processor = parts.model("clip", "llama", layer=-2)
    settings: Any = model.generation_config
    settings.temperature, settings.length_penalty = 0.9, 2.0
    set_reply_ends(model, processor)
    save_complete(model, tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert "temperature" not in saved
    assert "length_penalty" not in saved
    settings.do_sample, settings.temperature = True, 0.9
    set_reply_ends(model, processor)
    assert settings.temperature == 0.9


def test_heads_have_no_reply_to_end(parts: Parts, tmp_path: Path):
    model, processor = parts.model("clip", "llama", layer=-2)
    predicting = with_heads(model)
    set_reply_ends(predicting, processor)
    save_complete(predicting, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vlm_prediction"
