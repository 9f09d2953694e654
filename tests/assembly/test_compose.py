"""Composition: parts that fit arrive unchanged, parts that do not are refused by key."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    SiglipVisionModel,
    TimmWrapperImageProcessor,
)

from tests.tiny_parts import ENCODERS, LANGUAGE_MODELS, PATCHES, PREFIX_TOKENS, WIDTH, Parts, picture
from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.compose import (
    build_model,
    choose_attention,
    compose,
    recipe_differences,
    register_connector_class,
)
from vlm.config.model_schema import ModelConfig
from vlm.config.named import permit_names
from vlm.config.recorded import read_recipe
from vlm.models.connectors import CONNECTORS, Connector

# What is built


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoders_numbers_are_found_out(parts: Parts, encoder: str):
    """Patches, tokens before them and width, without weights."""
    config = compose(parts.recipe(encoder), None, None)[0]
    assert config.num_prefix_tokens == PREFIX_TOKENS[encoder]
    assert config.num_patches == PATCHES[encoder]
    assert config.vision_dim == (256 if encoder == "timm_convnet" else WIDTH)
    assert config.feature_layer is None


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("language_model", ["llama", "tied_llama"])
def test_parts_arrive_with_their_weights(parts: Parts, encoder: str, language_model: str):
    """Composing initialises nothing again; new rows of the embeddings stand behind the old."""
    model, processor = parts.model(encoder, language_model)
    for ours, theirs in (
        (model.visual_encoder, AutoModel.from_pretrained(parts.encoder(encoder))),
        (model.language_model, AutoModelForCausalLM.from_pretrained(parts.language_model(language_model))),
    ):
        values = ours.state_dict()
        expected = {k: v for k, v in theirs.state_dict().items() if not k.startswith("head.")}  # SigLIP's pooling head
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(values[name][: len(value)] if value.ndim else values[name], value), name
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert len(processor.tokenizer) <= model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_embeddings_grow_with_the_tokenizer_tied_or_not(parts: Parts, language_model: str):
    """To a multiple of 64, both tables, as one tensor where they are tied."""
    model, processor = parts.model("clip", language_model, start="<im_start>", end="<im_end>")
    before = AutoModelForCausalLM.from_pretrained(parts.language_model(language_model))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head is not None
    old = before.get_input_embeddings().num_embeddings
    assert old < len(processor.tokenizer) == old + 3
    assert embeddings.weight.shape == head.weight.shape == (384, WIDTH)
    assert (embeddings.weight is head.weight) == before.config.tie_word_embeddings
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == 384
    assert torch.equal(head.weight[:old], before.get_output_embeddings().weight)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits[..., :old], before(input_ids=ids).logits, atol=1e-5)


def test_embeddings_with_room_are_not_resized(parts: Parts, tmp_path: Path):
    """A language model with spare rows (Qwen) keeps its size."""
    grown = AutoModelForCausalLM.from_pretrained(parts.language_model("llama"))
    grown.resize_token_embeddings(330)
    shutil.copytree(parts.language_model("llama"), tmp_path / "roomy")
    grown.save_pretrained(tmp_path / "roomy")
    recipe = parts.recipe()
    recipe.language_model.hf_name = str(tmp_path / "roomy")
    config, processor = compose(recipe, None, None)
    model = build_model(recipe, config, processor, torch.float32, 0)
    assert torch.equal(model.get_input_embeddings().weight, grown.get_input_embeddings().weight)


def test_the_connectors_weights_depend_on_the_seed_alone(parts: Parts):
    one, same, other = (
        parts.model("clip", name, seed=seed)[0] for name, seed in (("llama", 1), ("qwen2", 1), ("llama", 2))
    )
    weights = [model.connector.state_dict() for model in (one, same, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not any(torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_a_language_models_taste_in_sampling_is_left_behind(parts: Parts, tmp_path: Path):
    """Its end tokens stay; temperature and the like are what the caller says, in a reloaded model too."""
    folder = tmp_path / "language_model"
    shutil.copytree(parts.language_model("llama"), folder)
    taste = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    GenerationConfig(eos_token_id=[2, 0], bos_token_id=3, pad_token_id=0, **taste).save_pretrained(folder)
    recipe = parts.recipe()
    recipe.language_model.hf_name = str(folder)
    config, processor = compose(recipe, None, None)
    model = build_model(recipe, config, processor, torch.float32, 0)
    model.save_pretrained(tmp_path / "saved")
    for one in (model, open_checkpoint(tmp_path / "saved").load_model(torch.float32, "auto")):
        settings = one.generation_config
        assert (settings.eos_token_id, settings.bos_token_id, settings.pad_token_id) == ([2, 0], 3, 0)
        assert not any(getattr(settings, name) == value for name, value in taste.items())


def test_every_part_is_built_in_the_dtype_asked_for(parts: Parts):
    recipe = parts.recipe()
    config, processor = compose(recipe, None, None)
    model = build_model(recipe, config, processor, torch.bfloat16, 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    pixels = processor.pixel_values([picture()])
    ids = torch.tensor([processor.tokenize("<image> a cat")[0]])
    assert torch.isfinite(model(input_ids=ids, pixel_values=pixels, labels=ids).loss)


def timm_folder(parts: Parts, folder: Path, **settings: Any) -> ModelConfig:
    """A recipe on a copy of the timm encoder with other image processing."""
    shutil.copytree(parts.encoder("timm_convnet"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    recipe = parts.recipe("timm_convnet")
    recipe.visual_encoder.hf_name = str(folder)
    return recipe


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_timm_encoders_see_pictures_as_timm_prepares_them(
    parts: Parts, tmp_path: Path, crop_mode: str, crop_pct: float, interpolation: str
):
    """To one step of 256, since Pillow and torchvision round differently."""
    settings = {"crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation}
    recipe = timm_folder(parts, tmp_path / "timm", **settings)
    processor = compose(recipe, None, None)[1]
    theirs = TimmWrapperImageProcessor.from_pretrained(tmp_path / "timm")
    for size in ((70, 50), (40, 90)):
        smooth = picture(0, (7, 5)).resize(size)
        expected = theirs([smooth], return_tensors="pt")["pixel_values"]
        assert torch.allclose(processor.pixel_values([smooth]), expected, atol=1.01 * 2 / 255)


def test_timm_encoders_that_want_pictures_otherwise_are_refused(parts: Parts, tmp_path: Path):
    with pytest.raises(ValueError, match=r"timm's crop_mode=border is not supported; supported are center, squash"):
        compose(timm_folder(parts, tmp_path / "timm", crop_mode="border"), None, None)


@pytest.mark.parametrize("kind", ["both towers", "vision half"])
def test_the_vision_half_of_a_two_tower_checkpoint_is_read(parts: Parts, tmp_path: Path, kind: str):
    """OpenAI's CLIP folders hold both towers, under `vision_model.`; only the vision half is built."""
    vision = CLIPVisionModel.from_pretrained(parts.encoder("clip"))
    shutil.copytree(parts.encoder("clip"), tmp_path / "clip")
    if kind == "both towers":
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        both = CLIPModel(CLIPConfig(vision_config=vision.config.to_dict(), text_config=text, projection_dim=8))
        both.vision_model.load_state_dict(vision.state_dict())
        both.save_pretrained(tmp_path / "clip")
    recipe = parts.recipe(layer=-2)
    recipe.visual_encoder.hf_name = str(tmp_path / "clip")
    config, processor = compose(recipe, None, None)
    model = build_model(recipe, config, processor, torch.float32, 0)
    expected = vision.state_dict()
    found = model.visual_encoder.state_dict()
    assert found
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_the_recipe_travels_in_the_configuration(parts: Parts):
    recipe = parts.recipe(connector="mlp", options={"num_layers": 3, "hidden_dim": None}, layer=-2)
    config = compose(recipe, None, None)[0]
    assert config.recipe == asdict(recipe)
    assert read_recipe(config.recipe) == recipe
    assert config.connector["options"]["num_layers"] == 3
    assert config.connector["options"]["activation"] == "gelu"  # complete: nothing is left to later defaults


# What is refused


REFUSED = {
    "layer too high": ({"layer": 4}, r"feature_layer=4: .*clip has 4 hidden states; allowed are -4 to 3"),
    "layer too low": ({"layer": -5}, r"feature_layer=-5: .*clip has 4 hidden states; allowed are -4 to 3"),
    "no CLS token": (
        {"encoder": "siglip", "strategy": "cls"},
        r"feature_strategy=cls: .*siglip has no CLS token; allowed are patch and full",
    ),
    "no CLS token beside patches": (
        {"encoder": "timm_convnet", "strategy": "cls+patch"},
        r"model.visual_encoder.feature_strategy=cls\+patch: .* has no CLS token",
    ),
    "widths": (
        {"encoder": "timm_convnet", "connector": "identity"},
        r"model.connector.type=identity needs equal widths: the visual encoder has 256, the language model 32",
    ),
    "connector": ({"connector": "conv"}, r"model.connector.type=conv: allowed are identity, linear, mlp"),
    "option": ({"options": {"depth": 2}}, r"model.connector.options.depth: mlp does not take it.* Allowed: num_layers"),
    "layers": ({"options": {"num_layers": 0}}, r"model.connector.options.num_layers=0: at least 1 is needed"),
    "activation": ({"options": {"activation": "sine"}}, r"options.activation=sine: allowed are .*gelu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_do_not_fit_are_refused_by_key(parts: Parts, name: str):
    wanted, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        parts.model(wanted.pop("encoder", "clip"), **wanted)


UNREAD = {
    ("clip", None): {"post_layernorm"},
    ("clip", -2): {"post_layernorm"},
    ("siglip", None): set(),
    ("siglip", -2): {"post_layernorm"},
    ("dinov2", None): {"mask_token"},
    ("dinov2", -2): {"mask_token", "layer.2.", "layernorm"},
}
"""Encoder and feature layer -> modules that the features do not depend on."""


@pytest.mark.parametrize(("encoder", "layer"), UNREAD)
def test_what_features_do_not_depend_on_is_known_beforehand(parts: Parts, encoder: str, layer: int | None):
    """It gets no gradient: the same names as a backward pass of the whole model shows."""
    recipe = parts.recipe(encoder)
    recipe.visual_encoder.feature_layer = layer
    config, processor = compose(recipe, "chatml", None)
    for name in config.unread_parameters:
        assert any(module in name for module in UNREAD[encoder, layer]), name
    assert all(any(module in name for name in config.unread_parameters) for module in UNREAD[encoder, layer])
    model = build_model(recipe, config, processor, torch.float32, seed=0)
    model.get_image_features(processor.pixel_values([picture()])).sum().backward()
    without = [name for name, weight in model.visual_encoder.named_parameters() if weight.grad is None]
    assert without == config.unread_parameters


def test_a_language_model_without_a_tokenizer_is_refused_by_key(parts: Parts, tmp_path: Path):
    recipe = parts.recipe()
    shutil.copy(Path(recipe.language_model.hf_name, "config.json"), tmp_path)
    recipe.language_model.hf_name = str(tmp_path)
    with pytest.raises(ValueError, match=rf"model.language_model.hf_name={re.escape(str(tmp_path))}: no tokenizer"):
        compose(recipe, None, None)


def test_a_part_that_transformers_does_not_know_is_refused_by_key(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    """Its checkpoint could not be loaded again."""
    monkeypatch.delitem(CONFIG_MAPPING._mapping, "clip_vision_model")  # as if its code came out of a repository
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: CLIPVisionConfig())
    with pytest.raises(ValueError, match=r"model.visual_encoder.hf_name=.*model_type=clip_vision_model"):
        compose(parts.recipe(), None, None)


@pytest.mark.parametrize("part", ["visual_encoder", "language_model"])
def test_a_folder_without_a_model_is_refused_by_key(parts: Parts, tmp_path: Path, part: str):
    recipe = parts.recipe()
    getattr(recipe, part).hf_name = str(tmp_path)
    with pytest.raises(ValueError, match=rf"model.{part}.hf_name={re.escape(str(tmp_path))}: no model configuration"):
        compose(recipe, None, None)


def test_a_language_model_is_no_visual_encoder(parts: Parts):
    model = parts.recipe()
    model.visual_encoder.hf_name = model.language_model.hf_name
    with pytest.raises(
        ValueError, match=r"visual_encoder.hf_name=.*model_type=llama is a language model, which reads no"
    ):
        compose(model, None, None)


def test_an_encoder_without_an_image_processor_is_refused_by_key(parts: Parts, tmp_path: Path):
    model = parts.recipe()
    (tmp_path / "config.json").write_bytes(Path(model.visual_encoder.hf_name, "config.json").read_bytes())
    model.visual_encoder.hf_name = str(tmp_path)
    with pytest.raises(
        ValueError, match=rf"model.visual_encoder.hf_name={re.escape(str(tmp_path))}: no image processor"
    ):
        compose(model, None, None)


def test_a_folder_that_lacks_weights_is_refused(parts: Parts, tmp_path: Path):
    """No part is initialised by chance where its file holds less than it needs."""
    folder = tmp_path / "more"
    shutil.copytree(parts.encoder("siglip"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    recipe = parts.recipe()
    recipe.visual_encoder.hf_name = str(folder)
    config, processor = compose(recipe, None, None)
    with pytest.raises(
        ValueError, match=r"more lacks 16 of the weights that SiglipVisionModel needs: \['encoder.layers.3"
    ):
        build_model(recipe, config, processor, torch.float32, 0)


def test_a_tokenizer_without_a_template_needs_one_named(parts: Parts):
    with pytest.raises(ValueError, match=r"dataset.template=tokenizer: .* has no chat template"):
        compose(parts.recipe("clip", "vicuna"), None, None)


def test_an_image_processor_of_no_fixed_size_is_refused(parts: Parts, tmp_path: Path):
    folder = tmp_path / "clip"
    shutil.copytree(parts.encoder("clip"), folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_center_crop": False}))
    recipe = parts.recipe()
    recipe.visual_encoder.hf_name = str(folder)
    with pytest.raises(ValueError, match="image processor has no fixed image size"):
        compose(recipe, None, None)


@pytest.mark.parametrize("kind", ["nowhere.at.all:Class", "vlm.models.connectors:NoSuchConnector"])
def test_a_connector_class_that_does_not_exist_is_refused_by_key(kind: str):
    permit_names([kind])
    with pytest.raises(ValueError, match=re.escape(f"model.connector.type={kind}: ")):
        register_connector_class(kind)
    assert kind not in CONNECTORS


def test_an_option_without_value_or_default_is_refused(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    class Strict(Connector):
        def __init__(self, vision_dim: int, text_dim: int, *, rate: float):
            super().__init__()

    monkeypatch.setitem(CONNECTORS, "strict", Strict)
    with pytest.raises(ValueError, match=r"model.connector.options.rate: strict needs a value for it"):
        compose(parts.recipe(connector="strict", options={"rate": None}), None, None)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = parts.model(layer=-2, image_mode="pad")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_checkpoints_model_is_loaded_as_it_was(parts: Parts, checkpoint: Path):
    model = open_checkpoint(checkpoint).load_model(torch.float32, "auto")
    expected = parts.model(layer=-2)[0].state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items() if "embed" not in name
               and "lm_head" not in name)  # fmt: skip


def test_a_checkpoints_processor_takes_another_template_and_mode(checkpoint: Path):
    kept = open_checkpoint(checkpoint).load_processor()
    assert kept.image_mode == "pad"
    assert "<|im_start|>" in kept.chat_template
    changed = open_checkpoint(checkpoint).load_processor("v1", "square")
    assert changed.image_mode == "square"
    assert "ASSISTANT: " in changed.chat_template
    assert open_checkpoint(checkpoint).load_processor("tokenizer").chat_template == changed.tokenizer.chat_template


def test_a_later_stage_may_go_back_to_the_tokenizers_own_template(parts: Parts, tmp_path: Path):
    """A pretraining on captions leaves the language model's template in the checkpoint."""
    config, processor = compose(parts.recipe(), None, None)
    own = processor.chat_template
    config.save_pretrained(tmp_path / "a")
    parts.processor(template="plain").save_pretrained(tmp_path / "a")
    assert "<|im_start|>" not in open_checkpoint(tmp_path / "a").load_processor().chat_template
    assert open_checkpoint(tmp_path / "a").load_processor("tokenizer").chat_template == own
    config, processor = compose(parts.recipe("clip", "vicuna"), "plain", None)
    config.save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"dataset.template=tokenizer: .*b has no chat template"):
        open_checkpoint(tmp_path / "b").load_processor("tokenizer")


def test_another_kind_of_checkpoint_is_refused(parts: Parts):
    with pytest.raises(ValueError, match="model_type=llama: it has no visual encoder"):
        open_checkpoint(parts.language_model("llama"))


def test_an_architecture_that_the_command_line_contradicts_is_listed(parts: Parts, checkpoint: Path):
    config = open_checkpoint(checkpoint).config
    wanted: Any = parts.recipe("siglip", connector="linear", layer=-2)
    assert recipe_differences(config, wanted, []) == []
    touched = ["visual_encoder", "connector.type", "language_model.hf_name"]
    assert recipe_differences(config, wanted, touched) == [
        ("model.visual_encoder.hf_name", str(parts.encoder("siglip")), str(parts.encoder("clip"))),
        ("model.connector.type", "linear", "mlp"),
    ]
    assert recipe_differences(config, parts.recipe(layer=-2, options={"bias": None}), ["connector"]) == []


# Attention


def test_auto_chooses_what_the_part_takes(parts: Parts):
    for name in ENCODERS:
        config = compose(parts.recipe(name), None, None)[0].vision_config
        assert choose_attention("auto", torch.float32, config, AutoModel) == "sdpa"
    assert choose_attention("eager", torch.float32, config, AutoModel) == "eager"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_is_used_by_both_parts(parts: Parts, attention: str, checkpoint: Path):
    recipe = parts.recipe("siglip")
    recipe.attn_implementation = attention
    config, processor = compose(recipe, None, None)
    model = build_model(recipe, config, processor, torch.float32, 0)
    assert isinstance(model.visual_encoder, SiglipVisionModel)
    loaded = open_checkpoint(checkpoint).load_model(torch.float32, attention)
    for one in (model, loaded):
        assert one.visual_encoder.config._attn_implementation == attention
        assert one.language_model.config._attn_implementation == attention
