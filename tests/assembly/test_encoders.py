"""Several feature layers, several encoders side by side: what is read, what is refused, what is kept."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import SizeDict

from tests.fixtures import losses
from tests.tiny_parts import ENCODERS, WIDTH, Parts, picture
from vlm.assembly.adapter_base import base_recipe, make_base
from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.compose import (
    build_model,
    choose_attention,
    compose,
    recipe_differences,
)
from vlm.assembly.quantization import make_checkpoint_quantization
from vlm.config.model_schema import EncoderConfig
from vlm.config.recorded import read_recipe
from vlm.config.schema import RunConfig
from vlm.hub.targets import EXPORT_FORMATS
from vlm.models import VLMForConditionalGeneration, VLMProcessor
from vlm.models.encoders import EncoderEnsemble
from vlm.models.pixels import pad_to_square
from vlm.train.parts import make_parts, table

Built = tuple[VLMForConditionalGeneration, VLMProcessor]

PAIRS: dict[str, dict[str, Any]] = {
    "dinov2 + siglip": {
        "encoder": "dinov2", "image_size": 24, "layer": -2, "extra_encoders": {"siglip": {"feature_layer": -2}},
    },
    "siglip + dinov2, own outputs": {
        "encoder": "siglip", "extra_encoders": {"dinov2_with_registers": {"image_size": 24}},
    },
    "clip + siglip, CLS left out, layers": {
        "encoder": "clip", "image_size": 24, "layer": [-2, -3],
        "extra_encoders": {"siglip": {"feature_layer": [3, 1, 2]}},
    },
    "three": {
        "encoder": "clip", "image_size": 24, "strategy": "cls+patch",
        "extra_encoders": {
            "dinov2": {"image_size": 24, "feature_strategy": "full"},
            "dinov2_with_registers": {"image_size": 24, "feature_layer": 1, "feature_strategy": "cls+patch"},
        },
    },
    "one feature map beside one token": {
        "encoder": "timm_convnet", "image_size": 32,
        "extra_encoders": {"timm_vit": {"image_size": 32, "feature_strategy": "cls"}},
    },
}  # fmt: skip
"""Compositions of several encoders."""


def model_of(parts: Parts, name: str, **more: Any) -> Built:
    wanted = {**PAIRS[name], **more}
    return parts.model(wanted.pop("encoder"), **wanted)


@pytest.fixture(scope="module")
def pair(parts: Parts) -> Built:
    """DINOv2 and SigLIP; tests must leave the weights as they are."""
    return model_of(parts, "dinov2 + siglip")


def by_hand(source: EncoderConfig, image: Image.Image, ours: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and features of one encoder as its own folder says, `(1, 3, h, w)` and `(1, features, width)`.

    timm's image processor, which `test_compose.py` looks at, is `ours`.
    """
    processor = ours
    if not Path(source.hf_name).name.startswith("timm"):
        processor = AutoImageProcessor.from_pretrained(source.hf_name)
        if source.image_size is not None:
            processor.size = SizeDict(height=source.image_size, width=source.image_size)
            processor.do_center_crop = False
    whole = AutoModel.from_pretrained(source.hf_name).eval()
    pixels = processor([image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = whole(pixels, output_hidden_states=True)
    layers = source.feature_layer if isinstance(source.feature_layer, list) else [source.feature_layer]
    states = [outputs.last_hidden_state if layer is None else outputs.hidden_states[layer] for layer in layers]
    tokens = torch.cat([to_tokens(state) for state in states], dim=2)
    prefix = 0 if states[0].ndim == 4 else PREFIX[Path(source.hf_name).name]
    chosen = {
        "patch": tokens[:, prefix:], "full": tokens, "cls": tokens[:, :1],
        "cls+patch": torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1),
    }  # fmt: skip
    return pixels, chosen[source.feature_strategy]


def to_tokens(state: torch.Tensor) -> torch.Tensor:
    """A hidden state of an encoder as `(images, tokens, width)`."""
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state


PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 3, "timm_vit": 1}


# Several layers


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name != "timm_convnet"])
@pytest.mark.parametrize("layers", [[-2, -3], [1, 3], [-1, 0, -1], [0, 1, 2]])
def test_several_layers_stand_side_by_side_in_their_order(parts: Parts, encoder: str, layers: list[int]):
    if encoder.startswith("timm"):
        layers = [min(layer, 2) for layer in layers]  # it has no state of its embeddings
    model, processor = parts.model(encoder, layer=layers, strategy="full")
    whole = AutoModel.from_pretrained(parts.encoder(encoder)).eval()
    pixels = processor.pixel_values([picture(0), picture(1)])
    with torch.no_grad():
        states = whole(pixels, output_hidden_states=True).hidden_states
        features = model.eval().encode_images(pixels)
    expected = torch.cat([to_tokens(states[layer]) for layer in layers], dim=2)
    assert torch.allclose(features, expected, atol=1e-6)
    assert model.config.vision_dim == WIDTH * len(layers)
    assert model.config.feature_layer == [layer % len(states) for layer in layers]


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_layers_past_the_last_one_that_is_read_are_not_built(parts: Parts, encoder: str):
    config = parts.model(encoder, layer=[-3, -2])[0].config
    assert config.vision_config.num_hidden_layers == 2
    assert not any("layers.1" in name for name in config.unread_parameters)


def test_only_the_hidden_states_that_are_read_are_kept(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    model, processor = parts.model("dinov2", layer=[1, 2])
    asked = []
    forward = model.visual_encoder.forward
    monkeypatch.setattr(
        model.visual_encoder, "forward", lambda *a, **k: asked.append(k["output_hidden_states"]) or forward(*a, **k)
    )
    model.get_image_features(processor.pixel_values([picture()]))
    assert asked == [[1, 2]]


# Several encoders


@pytest.mark.parametrize("name", PAIRS)
def test_features_are_those_of_the_encoders_alone(parts: Parts, name: str):
    """Each sees the picture as its own image processor prepares it; channels stand in the order of the encoders."""
    model, processor = model_of(parts, name)
    given = read_recipe(model.config.recipe).visual_encoder
    images = [picture(0), picture(1, (30, 50))]
    sources = list(zip((given, *given.extra_encoders), processor.image_processors, strict=True))
    expected = [[by_hand(source, image, ours) for source, ours in sources] for image in images]
    pixels = processor.pixel_values(images)
    assert pixels.shape[1] == 3 * (1 + len(given.extra_encoders))
    for row, seen in enumerate(expected):
        assert torch.allclose(pixels[row : row + 1], torch.cat([one for one, _ in seen], dim=1), atol=1e-5)
    with torch.no_grad():
        features = model.eval().encode_images(pixels)
        tokens = model.get_image_features(pixels)
    wanted = torch.cat([torch.cat([one for _, one in seen], dim=2) for seen in expected])
    assert torch.allclose(features, wanted, atol=1e-5)
    assert features.shape == (2, model.config.num_features, model.config.vision_dim)
    assert tokens.shape == (2, processor.tokens_per_image, WIDTH)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_reach_what_is_read_and_nothing_else(parts: Parts, name: str):
    model, processor = model_of(parts, name)
    model.get_image_features(processor.pixel_values([picture()])).square().sum().backward()
    without = [one for one, weight in model.visual_encoder.named_parameters() if weight.grad is None]
    assert without == model.config.unread_parameters
    first = f"encoders.{len(model.config.encoder_names) - 1}."
    assert any(one.startswith(first) and w.grad is not None for one, w in model.visual_encoder.named_parameters())


def test_gradient_checkpointing_gives_the_same_gradients(pair: Built):
    model, processor = pair
    model.train()
    pixels = processor.pixel_values([picture()])
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.get_image_features(pixels).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.visual_encoder.named_parameters() if p.grad is not None})
    model.activation_checkpointing_disable()
    model.zero_grad()
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(gradient, found[1][name], atol=1e-6) for name, gradient in found[0].items())


def test_frozen_encoders_build_no_graph_and_stay_in_evaluation_mode(parts: Parts):
    model, processor = model_of(parts, "dinov2 + siglip")
    model.visual_encoder.requires_grad_(False)
    model.train()
    assert not any(module.training for module in model.visual_encoder.modules())
    seen: list[torch.Tensor] = []
    model.connector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.get_image_features(processor.pixel_values([picture()])).sum().backward()
    assert not seen[0].requires_grad
    model.visual_encoder.encoders[1].requires_grad_(True)
    assert model.train().visual_encoder.training


def test_they_are_one_part(parts: Parts):
    """Every parameter belongs to it, with the ones that are not read; the table names both sources."""
    model, _ = model_of(parts, "dinov2 + siglip")
    config = RunConfig(model=read_recipe(model.config.recipe))
    split = make_parts(model, config.trainer, config.model)[0]
    assert split.name == "visual_encoder"
    assert len(split.parameters) == len(list(model.visual_encoder.parameters()))
    assert split.unread == {f"visual_encoder.{name}" for name in model.config.unread_parameters}
    assert f"{parts.encoder('dinov2')} + {parts.encoder('siglip')}" in table([split])


def test_one_encoder_is_held_as_it_is(parts: Parts):
    """Its names in checkpoints have nothing of several."""
    model, processor = parts.model("clip")
    assert not isinstance(model.visual_encoder, EncoderEnsemble)
    names = set(AutoModel.from_pretrained(parts.encoder("clip")).state_dict())
    assert {name for name in model.state_dict() if name.startswith("visual_encoder.")} == {
        f"visual_encoder.{name}" for name in names
    }
    assert model.config.encoder_names == ["vision_config"]
    assert processor.pixel_values([picture()]).shape == (1, 3, 24, 24)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_encoder_has_the_attention_asked_for(parts: Parts, attention: str, tmp_path: Path):
    recipe = parts.recipe("dinov2", image_size=24, extra_encoders={"siglip": {}})
    recipe.attn_implementation = attention
    config, processor = compose(recipe, None, None)
    model = build_model(recipe, config, processor, torch.float32, 0)
    model.save_pretrained(tmp_path)
    loaded = open_checkpoint(tmp_path).load_model(torch.float32, attention)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=attention)
    for one in (model, loaded, plain):
        assert [e.config._attn_implementation for e in one.visual_encoder.encoders] == [attention] * 2
    plain.set_attn_implementation({"vision_config_2": "eager", "vision_config": "sdpa"})
    assert [e.config._attn_implementation for e in plain.visual_encoder.encoders] == ["sdpa", "eager"]
    assert choose_attention("auto", torch.float32, config.vision_config_2, AutoModel) == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_encoder_is_built_and_loaded_in_the_dtype_asked_for(parts: Parts, dtype: torch.dtype, tmp_path: Path):
    recipe = parts.recipe("dinov2", image_size=24, extra_encoders={"siglip": {}})
    config, processor = compose(recipe, None, None)
    model = build_model(recipe, config, processor, dtype, 0)
    model.save_pretrained(tmp_path)
    loaded = open_checkpoint(tmp_path).load_model(dtype, "auto")
    for one in (model, loaded):
        assert {parameter.dtype for parameter in one.parameters()} == {dtype}
        assert torch.isfinite(one.get_image_features(processor.pixel_values([picture()]))).all()


# Pixels


def test_raw_pixels_are_whole_numbers_that_each_encoder_normalises(pair: Built):
    processor = pair[1]
    images = [picture(0), picture(1, (24, 24))]
    raw = processor.raw_pixels(images)
    assert raw.dtype == torch.uint8
    assert raw.shape == (2, 6, 24, 24)
    assert torch.equal(raw[1, :3], raw[1, 3:])  # no resizing: the very picture
    normal = processor.normalise(raw)
    assert torch.equal(normal, processor.pixel_values(images))
    assert torch.equal(processor.normalise(normal), normal)
    assert not torch.allclose(normal[1, :3], normal[1, 3:])
    tensors = [pil_to_tensor(image) for image in images]
    assert processor.accepts_tensors
    assert torch.equal(processor.raw_pixels(tensors), raw)


def test_an_encoder_whose_image_processor_does_more_gives_normalised_pixels(pair: Built, monkeypatch):
    processor = pair[1]
    images = [picture(0)]
    expected = processor.pixel_values(images)
    monkeypatch.setattr(processor.beside[0], "do_pad", True, raising=False)
    assert not processor.accepts_tensors
    raw = processor.raw_pixels(images)
    assert raw.is_floating_point()
    assert torch.allclose(processor.normalise(raw), expected, atol=1e-6)


def test_each_encoder_is_padded_in_its_own_mean_colour(parts: Parts):
    """Padding is all but zero behind each normalisation."""
    wanted = {**PAIRS["dinov2 + siglip"]}
    processor = parts.processor(wanted.pop("encoder"), image_mode="pad", **wanted)
    white = Image.new("RGB", (240, 80), "white")
    pixels = processor.pixel_values([white])
    for steps, seen in zip(processor.image_processors, pixels.chunk(2, dim=1), strict=True):
        colour = tuple(int(mean * 255) for mean in steps.image_mean)
        expected = steps([pad_to_square(white, colour)], return_tensors="pt")["pixel_values"]
        assert torch.equal(seen, expected)
        assert seen[..., :6, :].abs().max() < 0.04
    means = [steps.image_mean for steps in processor.image_processors]
    assert list(means[0]) != list(means[1])


# Checkpoints


@pytest.mark.parametrize("name", PAIRS)
def test_models_and_processors_come_back_as_they_were(parts: Parts, name: str, tmp_path: Path):
    model, processor = model_of(parts, name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.config.feature_selections == model.config.feature_selections
    for again in (AutoProcessor.from_pretrained(tmp_path), open_checkpoint(tmp_path).load_processor()):
        assert [type(one) for one in again.image_processors] == [type(one) for one in processor.image_processors]
        inputs, other = (one(images=[picture()], text="<image> a cat") for one in (processor, again))
        assert inputs.keys() == other.keys()
        assert all(torch.equal(inputs[key], other[key]) for key in inputs)
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, loaded(**other).logits)


def test_an_architecture_that_the_command_line_contradicts_is_listed(parts: Parts, tmp_path: Path):
    model, _ = model_of(parts, "dinov2 + siglip")
    recipe = parts.recipe("dinov2", image_size=24, layer=-2, extra_encoders={"siglip": {"feature_layer": -3}})
    assert recipe_differences(model.config, recipe, []) == []
    for touched in ("visual_encoder", "visual_encoder.extra_encoders", "visual_encoder.extra_encoders.0.feature_layer"):
        different = recipe_differences(model.config, recipe, [touched])
        assert [key for key, *_ in different] == ["model.visual_encoder.extra_encoders"]
    recorded = model.config.recipe["visual_encoder"]
    same = parts.recipe("dinov2", image_size=24, layer=-2, extra_encoders={"siglip": {"feature_layer": -2}})
    assert recipe_differences(model.config, same, ["visual_encoder"]) == []
    recorded["beside"] = recorded.pop("extra_encoders")  # as earlier checkpoints call it
    assert recipe_differences(model.config, same, ["visual_encoder"]) == []
    assert len(recipe_differences(model.config, recipe, ["visual_encoder"])) == 1
    del recorded["beside"]  # as a checkpoint was written before there were several
    assert not recipe_differences(model.config, parts.recipe("dinov2", image_size=24, layer=-2), ["visual_encoder"])


def test_a_quantised_checkpoint_leaves_no_encoder_out(pair: Built):
    """Every Linear of both encoders is stored in few bits."""
    config = pair[0].config
    try:
        bits = make_checkpoint_quantization(config, {"visual_encoder": "8bit"})
    except ValueError:
        pytest.skip("bitsandbytes is not installed")
    assert bits is not None
    assert not any(name.startswith("visual_encoder.") for name in bits.llm_int8_skip_modules)


def test_an_adapter_remembers_every_encoder_it_was_trained_on(parts: Parts):
    """Each by its own source; code out of none of their repositories runs unless the caller allows it."""
    trained = parts.recipe("dinov2", image_size=24, extra_encoders={"siglip": {"trust_remote_code": True}})
    config = RunConfig(model=trained)
    config.trainer.lora.language_model.r = 2
    base = make_base(config)
    assert base is not None
    assert set(base.sources) == {"visual_encoder", "visual_encoder.extra_encoders.0", "language_model"}
    again = base_recipe(base, trust_remote_code=False)
    assert again.visual_encoder.extra_encoders[0].hf_name == str(parts.encoder("siglip"))
    assert not again.visual_encoder.extra_encoders[0].trust_remote_code
    assert base_recipe(base, trust_remote_code=True) == trained


def test_no_export_is_made_of_several_encoders_or_layers(pair: Built, parts: Parts):
    """Each target says so by key."""
    layers = parts.model("clip", layer=[-2, -3])
    for target in EXPORT_FORMATS.values():
        for (model, processor), said in (
            (pair, "model.visual_encoder.extra_encoders:"),
            (layers, "feature_layer=[-2, -3]:"),
        ):
            assert any(said in one for one in target.incompatibilities(model.config, processor))


def test_tiles_are_cut_for_each_encoder(parts: Parts):
    """`model.anyres` and several encoders: views stacked by channel, each resized and normalised as its encoder's."""
    wanted = parts.recipe("dinov2", image_size=24, extra_encoders={"siglip": {}})
    wanted.anyres.grids = [[1, 2], [2, 1]]
    config, processor = compose(wanted, None, None)
    model = build_model(wanted, config, processor, torch.float32, 0).eval()
    inputs = processor(images=[picture(0, (60, 25))], text="<image> a cat")
    assert inputs["pixel_values"].shape == (3, 6, 24, 24)
    for index, encoder in enumerate(("dinov2", "siglip")):
        alone = parts.recipe(encoder, image_size=24)
        alone.anyres.grids = [[1, 2], [2, 1]]
        expected = compose(alone, None, None)[1](images=[picture(0, (60, 25))], text="<image> a cat")
        assert torch.equal(inputs["pixel_values"][:, 3 * index : 3 * index + 3], expected["pixel_values"])
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.isfinite(model(**inputs, labels=inputs["input_ids"]).loss)


# Refusals


REFUSED = {
    "pictures of two sizes": (
        {"encoder": "dinov2", "extra_encoders": {"siglip": {}}},
        r"need images of the same size.*dinov2 \(model.visual_encoder.image_size=null\) 16 x 16 pixels, .*siglip "
        r"\(model.visual_encoder.extra_encoders.0.image_size=null\) 24 x 24 pixels. Set the image_size of one",
    ),
    "unequal features": (
        {"encoder": "dinov2", "image_size": 24, "strategy": "cls+patch", "extra_encoders": {"siglip": {}}},
        r"same number of features: .*dinov2 \(model.visual_encoder.image_size=24\) 10 features, .*siglip .* 9 features",
    ),
    "different parts of a picture": (
        {"encoder": "clip", "extra_encoders": {"siglip": {}}},
        r"see different parts of an image \(dataset.image_mode=square\): model.visual_encoder keeps its middle, 100% "
        r"of the shorter side, model.visual_encoder.extra_encoders.0 squashes .* model.visual_encoder.image_size=24 "
        "squashes",
    ),
    "a size that it does not take": (
        {"encoder": "clip", "image_size": 32},
        r"model.visual_encoder.image_size=32: .*clip does not accept images of this size: Input image size \(32\*32\)",
    ),
    "a layer of one beside": (
        {"encoder": "clip", "image_size": 24, "extra_encoders": {"siglip": {"feature_layer": [-1, 9]}}},
        r"model.visual_encoder.extra_encoders.0.feature_layer=\[-1, 9\]: .*siglip has 4 hidden states; allowed are -4 "
        "to 3",
    ),
    "maps of several sizes": (
        {"encoder": "timm_convnet", "layer": [-1, 0]},
        r"model.visual_encoder.feature_layer=\[-1, 0\]: these layers of .* have 1, 256 features; choose layers with",
    ),
    "no CLS token beside": (
        {
            "encoder": "clip",
            "strategy": "cls",
            "image_size": 24,
            "extra_encoders": {"siglip": {"feature_strategy": "cls"}},
        },
        r"model.visual_encoder.extra_encoders.0.feature_strategy=cls: .*siglip has no CLS token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_encoders_that_do_not_fit_are_refused_by_key(parts: Parts, name: str):
    wanted, said = REFUSED[name]
    wanted = dict(wanted)
    with pytest.raises(ValueError, match=said):
        compose(parts.recipe(wanted.pop("encoder"), **wanted), None, None)


def test_a_square_pad_shows_all_the_same(parts: Parts):
    """Nothing is cropped off a padded picture, where the image processor crops no more than to a square."""
    recipe = parts.recipe("clip", extra_encoders={"siglip": {}})
    processor = compose(recipe, None, "pad")[1]
    assert processor.pixel_values([picture()]).shape == (1, 6, 24, 24)


def test_a_folder_without_a_model_is_refused_by_key(parts: Parts, tmp_path: Path):
    recipe = parts.recipe("clip", image_size=24)
    recipe.visual_encoder.extra_encoders = [EncoderConfig(str(tmp_path))]
    with pytest.raises(ValueError, match=rf"encoder.extra_encoders.0.hf_name={re.escape(str(tmp_path))}: no model"):
        compose(recipe, None, None)


# Training


def test_a_run_with_two_encoders(train: Callable[..., Path], parts: Parts, world: Path, tmp_path: Path):
    """Both encoders train, the run's checkpoint is complete, and a second stage starts from it."""
    extra_encoders = f"[{{hf_name: {parts.encoder('siglip')}, feature_layer: -2}}]"
    run = train(
        "finetune-smol", tmp_path / "one", f"model.visual_encoder.hf_name={parts.encoder('dinov2')}",
        "model.visual_encoder.image_size=24", "model.visual_encoder.feature_layer=[-2,-3]",
        f"model.visual_encoder.extra_encoders={extra_encoders}", "trainer/unfreeze=all",
        "trainer.learning_rate.visual_encoder_learning_rate=1e-3", "trainer.num_train_epochs=2",
    )  # fmt: skip
    assert losses(run)[-1] < losses(run)[0]
    assert (run / "first_batch" / "0.png").exists()
    model = AutoModelForImageTextToText.from_pretrained(run / "final")
    before = AutoModel.from_pretrained(parts.encoder("siglip")).state_dict()
    after = model.visual_encoder.encoders[1].state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert model.config.vision_dim == 3 * WIDTH
    second = train(
        "finetune-smol", tmp_path / "two", f"trainer.from_pretrained={run / 'final'}", "trainer.num_train_epochs=1",
        f"model.visual_encoder.hf_name={parts.encoder('dinov2')}",
    )  # fmt: skip
    frozen = AutoModelForImageTextToText.from_pretrained(second / "final").visual_encoder.state_dict()
    assert all(torch.equal(value, model.visual_encoder.state_dict()[name]) for name, value in frozen.items())
