"""Connectors: the contract, for every row of the table; and those that map every feature by itself."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from tests.tiny_parts import PATCHES, Parts, picture
from vlm.assembly.compose import compose
from vlm.models import VLMForConditionalGeneration
from vlm.models.connector_parts import GridConnector
from vlm.models.connectors import CONNECTORS, Connector, connector_class, connector_options, count_tokens

SMALL: dict[str, dict[str, Any]] = {
    "pixel_shuffle": {"factor": 3},
    "pooling": {"kernel": 3},
    "c_abstractor": {"num_queries": 4, "num_blocks": 1, "hidden_dim": 8, "position_side": 3},
    "ldp_v2": {"output_side": 2},
    "resampler": {"num_queries": 4, "num_layers": 2, "num_heads": 2},
    "qformer": {"num_queries": 4, "num_layers": 2, "hidden_dim": 8, "num_heads": 2},
}
"""Options that fit a grid of 3 x 3 as well as one of 6 x 6, by connector; defaults for the others."""

BIG = {"pooling": {"output_side": 12}}
"""Options without a default, for an encoder of real size."""

GRIDS = [kind for kind, connector in CONNECTORS.items() if issubclass(connector, GridConnector)]


def small(kind: str, features: int = 36) -> tuple[Connector, torch.Tensor, dict[str, Any]]:
    """A connector, features for it that ask for gradients, and its options."""
    options = connector_options(kind, SMALL.get(kind, {}))
    vision_dim, text_dim = 16, 16 if kind == "identity" else 24
    return CONNECTORS[kind](vision_dim, text_dim, **options), torch.randn(2, features, 16, requires_grad=True), options


def logits(model: VLMForConditionalGeneration, processor: Any) -> torch.Tensor:
    inputs = processor(images=[picture(0), picture(1)], text="a <image> and a <image>")
    with torch.no_grad():
        return model.eval()(**inputs).logits


# Every connector


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_connector_gives_the_tokens_that_it_says(kind: str):
    """`(images, features, vision_dim) -> (images, tokens, text_dim)`."""
    connector, inputs, options = small(kind)
    outputs = connector(inputs)
    assert outputs.shape == (2, count_tokens(kind, 36, options), 16 if kind == "identity" else 24)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_parameter_and_every_feature_of_a_connector_gets_a_gradient(kind: str):
    connector, inputs, _ = small(kind)
    outputs = connector(inputs)
    (outputs * torch.randn_like(outputs)).sum().backward()  # a plain sum is blind to what a norm takes out
    assert inputs.grad.abs().sum(dim=2).min() > 0
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name
        # a bias of keys shifts all scores of a query alike, which a softmax does not see
        assert name.endswith("key.bias") or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_connector_keeps_images_apart(kind: str):
    connector = small(kind)[0].eval()
    inputs = torch.randn(3, 36, 16)
    with torch.no_grad():
        assert torch.allclose(connector(inputs)[1:2], connector(inputs[1:2]), atol=1e-6)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_connector_runs_in_bfloat16(kind: str):
    connector, inputs, _ = small(kind)
    exact = connector.eval()(inputs)
    rounded = connector.bfloat16()(inputs.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(rounded.float(), exact, dim=2).min() > 0.97


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_option_is_keyword_only(kind: str):
    """So that YAML options are checked against the signature."""
    assert issubclass(CONNECTORS[kind], Connector)
    with pytest.raises(ValueError, match=rf"model.connector.options.nonsense: {kind} does not take it"):
        connector_options(kind, {"nonsense": 1})


@pytest.mark.parametrize("kind", CONNECTORS)
def test_a_connectors_defaults_fit_an_encoder_of_real_size(kind: str):
    """CLIP ViT-L/14 at 336 pixels: 24 x 24 features 1024 wide; shapes alone, without numbers."""
    options = connector_options(kind, BIG.get(kind, {}))
    with torch.device("meta"):
        connector = CONNECTORS[kind](1024, 1024, **options)
        outputs = connector(torch.empty(1, 576, 1024))
    assert outputs.shape == (1, count_tokens(kind, 576, options), 1024)


@pytest.mark.parametrize("kind", [kind for kind in CONNECTORS if kind != "identity"])
def test_every_connector_can_normalise_what_it_reads(kind: str):
    """`input_norm`, which `pretrain-smol` gives whatever the connector: the scale of features makes no difference."""
    connector = CONNECTORS[kind](16, 24, **connector_options(kind, {**SMALL.get(kind, {}), "input_norm": True})).eval()
    features = torch.randn(2, 36, 16)
    with torch.no_grad():
        assert torch.allclose(connector(features), connector(1000 * features + 7), atol=1e-3)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_norms_and_biases_do_not_decay(kind: str):
    connector = small(kind)[0]
    decayed = Trainer.get_decay_parameter_names(None, connector)  # pyright: ignore[reportArgumentType]
    for name, parameter in connector.named_parameters():
        is_matrix = parameter.ndim > 1  # queries and positions too
        assert (name in decayed) == is_matrix, name


# In a model


@pytest.mark.parametrize("kind", CONNECTORS)
def test_a_model_with_any_connector_comes_back_as_it_was(parts: Parts, kind: str, tmp_path: Path):
    """The processor writes as many placeholders as the model has features; saved and loaded, its logits are equal."""
    model, processor = parts.model("clip", "llama", connector=kind, options=SMALL.get(kind))
    assert processor.tokens_per_image == count_tokens(kind, PATCHES["clip"], model.config.connector["options"])
    assert processor.tokenize("a <image> b")[0].count(processor.image_token_id) == processor.tokens_per_image
    model.save_pretrained(tmp_path)
    loaded, info = VLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded, processor), logits(model, processor))
    assert not (tmp_path / "user_connector.py").exists()


@pytest.mark.parametrize("kind", [kind for kind in CONNECTORS if kind != "identity"])
def test_what_a_checkpoint_lacks_of_a_connector_begins_as_in_a_new_one(parts: Parts, kind: str, tmp_path: Path):
    """Built on the meta device by `from_pretrained`, bare parameters have no values until they are reset."""
    model, _ = parts.model("clip", "llama", connector=kind, options=SMALL.get(kind))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("connector.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = VLMForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in loaded.connector.named_parameters():
        fresh = model.connector.get_parameter(name)
        assert value.isfinite().all(), name
        if fresh.ndim == 1 and fresh.unique().numel() == 1:  # norms, biases of zero
            assert torch.equal(value, fresh), name
        elif fresh.numel() > 30:
            assert value.std().item() == pytest.approx(fresh.std().item(), rel=0.5), name


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("strategy", ["cls+patch", "full"])
def test_features_that_are_no_grid_are_refused_before_weights_load(parts: Parts, kind: str, strategy: str):
    recipe = parts.recipe("clip", "llama", connector=kind, options=SMALL.get(kind), strategy=strategy)
    message = "model.connector.type: .* 10 features are none: 3 x 3 and 1 more.*feature_strategy=patch"
    with pytest.raises(ValueError, match=message):
        compose(recipe, None, None)


@pytest.mark.parametrize("kind", ["resampler", "qformer"])
def test_queries_read_features_of_any_number(parts: Parts, kind: str):
    model, processor = parts.model("clip", "llama", connector=kind, options=SMALL[kind], strategy="cls+patch")
    assert model.config.num_features == 10
    assert processor.tokens_per_image == 4
    assert logits(model, processor).isfinite().all()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "factor 0": ("pixel_shuffle", {"factor": 0}, "factor=0: at least 1 is needed"),
    "factor half": ("pixel_shuffle", {"factor": 0.5}, "factor=0.5: a whole number is needed"),
    "factor odd": ("pixel_shuffle", {"factor": 2}, "factor=2: .* 3 x 3 features.* Allowed: 1, 3"),
    "no pooling": ("pooling", {}, "kernel=None, model.connector.options.output_side=None: exactly one"),
    "two poolings": ("pooling", {"kernel": 1, "output_side": 1}, "kernel=1, .*output_side=1: exactly one"),
    "kernel": ("pooling", {"kernel": 2}, "kernel=2: .* 3 x 3 features.* Allowed: 1, 3"),
    "pooled side": ("pooling", {"output_side": 4}, "output_side=4: .* Allowed: 1 to 3"),
    "side": ("ldp_v2", {}, "output_side=12: .* Allowed: 1 to 3"),
    "no square": ("c_abstractor", {"num_queries": 6}, "num_queries=6: .*such as 4 or 9"),
    "too many": ("c_abstractor", {"num_queries": 16}, "num_queries=16: .* Allowed: square numbers up to 9"),
    "no queries": ("resampler", {"num_queries": 0}, "num_queries=0: at least 1 is needed"),
    "queries in words": ("qformer", {"num_queries": "many"}, "num_queries=many: a whole number is needed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_fit_the_features_are_refused_before_weights_load(parts: Parts, case: str):
    kind, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"model.connector.options.{message}"):
        compose(parts.recipe("clip", "llama", connector=kind, options=options), None, None)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "layers": ("pixel_shuffle", {"num_layers": 0}, "num_layers=0: at least 1 is needed"),
    "activation": ("pooling", {"kernel": 1, "activation": "sine"}, "activation=sine: allowed are .*gelu"),
    "blocks": ("c_abstractor", {"num_blocks": 0}, "num_blocks=0: at least 1 is needed"),
    "positions": ("c_abstractor", {"position_side": 0}, "position_side=0: at least 1 is needed"),
    "heads": ("resampler", {"num_heads": 3}, "num_heads=3: hidden_dim=16 .* Allowed: 1, 2, 4, 8, 16; or"),
    "squared": ("resampler", {"activation": "sq"}, "activation=sq: allowed are .*relu2"),
    "heads of width": ("qformer", {"hidden_dim": 9, "num_heads": 2}, "num_heads=2: hidden_dim=9 .* Allowed: 1, 3, 9;"),
    "frequency": ("qformer", {"cross_attention_frequency": 0}, "cross_attention_frequency=0: at least 1"),
    "dropout": ("qformer", {"dropout": 1.0}, "dropout=1.0: at least 0 and less than 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_of_no_sense_are_refused_by_their_full_key(case: str):
    kind, options, message = WRONG[case]
    with pytest.raises(ValueError, match=f"model.connector.options.{message}"):
        CONNECTORS[kind](16, 24, **connector_options(kind, options))


# Those that map every feature by itself


def test_identity_changes_nothing_and_has_no_weights():
    connector = CONNECTORS["identity"](8, 8)
    inputs = torch.randn(1, 2, 8)
    assert connector(inputs) is inputs
    assert not list(connector.parameters())


def test_linear_is_one_affine_map():
    connector = CONNECTORS["linear"](4, 6)
    assert {name: tuple(value.shape) for name, value in connector.named_parameters()} == {
        "linear.weight": (6, 4), "linear.bias": (6,),
    }  # fmt: skip
    assert "linear.bias" not in dict(CONNECTORS["linear"](4, 6, bias=False).named_parameters())
    normed = CONNECTORS["linear"](4, 6, input_norm=True)
    assert torch.allclose(normed(torch.randn(1, 1, 4) * 1e4).abs().max(), torch.tensor(1.0), atol=5)


def test_mlp_by_default_is_llavas_mlp2x_gelu():
    layers = list(CONNECTORS["mlp"](4, 6).layers)
    assert [type(layer) for layer in layers[::2]] == [nn.Linear, nn.Linear]
    assert [(layer.in_features, layer.out_features) for layer in layers[::2]] == [(4, 6), (6, 6)]
    values = torch.linspace(-3, 3, 20)
    assert torch.allclose(layers[1](values), nn.functional.gelu(values))  # exact, not the tanh approximation


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_mlp_has_as_many_maps_as_asked_for(num_layers: int):
    """An activation between two maps, none at the ends; `hidden_dim` wide in between."""
    layers = list(
        CONNECTORS["mlp"](4, 6, num_layers=num_layers, hidden_dim=5, input_norm=True, activation="relu").layers
    )
    assert isinstance(layers.pop(0), nn.LayerNorm)
    maps = layers[::2]
    assert len(maps) == num_layers
    widths = [4, *[5] * (num_layers - 1), 6]
    assert [(layer.in_features, layer.out_features) for layer in maps] == list(pairwise(widths))
    assert not any(isinstance(layer, nn.Linear) for layer in layers[1::2])


def test_options_are_completed_with_the_classes_own_defaults():
    """What is recorded in a checkpoint does not change when a default does."""
    complete = connector_options("mlp", {"num_layers": 3, "hidden_dim": None})
    assert complete == {"num_layers": 3, "activation": "gelu", "hidden_dim": None, "bias": True, "input_norm": False}


def test_an_unknown_connector_names_the_table():
    with pytest.raises(ValueError, match=rf"model.connector.type=conv: allowed are {', '.join(CONNECTORS)}, or"):
        connector_class("conv")


def test_a_class_without_a_count_keeps_the_number_of_features(monkeypatch: pytest.MonkeyPatch):
    class Plain(nn.Module):
        def __init__(self, vision_dim: int, text_dim: int):
            super().__init__()

    monkeypatch.setitem(CONNECTORS, "plain", Plain)
    assert count_tokens("plain", 49, {}) == 49
