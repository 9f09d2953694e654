"""What cannot read images at native resolution is refused before weights load, with its key."""

from typing import Any

import pytest
from torch import nn

from tests.tiny_parts import NATIVE_ENCODERS, Parts
from vlm.assembly.compose import compose
from vlm.config.model_schema import AnyResConfig, NativeConfig
from vlm.models.connectors import CONNECTORS
from vlm.train.sharding import check_same_calls


@pytest.mark.parametrize(
    ("encoder", "recipe", "image_mode", "message"),
    [
        (
            "dinov2",
            {"connector": "ldp"},
            "native",
            r"model.connector.type=ldp: .* allowed are identity",
        ),
        ("dinov2", {"connector": "pooling", "options": {"output_side": 1}}, "native", "model.connector.type=pooling"),
        ("dinov2", {"connector": "c_abstractor", "options": {"num_queries": 4}}, "native", "type=c_abstractor"),
        ("dinov2", {"strategy": "cls+patch"}, "native", r"feature_strategy=cls\+patch: .* a single encoder reads"),
        ("dinov2", {"image_size": 16}, "native", "image_size=16: .* a single encoder reads"),
        ("clip", {"extra_encoders": {"siglip": {}}}, "native", "extra_encoders: .* a single encoder reads"),
        ("timm_convnet", {}, "native", "dataset.image_mode=native needs an encoder of patches"),
        ("siglip2_naflex", {}, "square", "dataset.image_mode=square: .* reads images only at native"),
        ("qwen2_5_vl", {}, "pad", "dataset.image_mode=pad: .*native, or null, is needed"),
        ("qwen2_5_vl", {"layer": -2}, None, "feature_layer=-2: .* output before its merger; null is needed"),
    ],
)
def test_what_does_not_fit_is_refused(parts: Parts, encoder: str, recipe: dict[str, Any], image_mode, message: str):
    with pytest.raises(ValueError, match=message):
        compose(parts.recipe(encoder, **recipe), None, image_mode)


def test_bounds_are_checked_and_need_native_resolution(parts: Parts):
    recipe = parts.recipe("dinov2")
    recipe.native = NativeConfig(min_tokens=9, max_tokens=8)
    with pytest.raises(ValueError, match=r"model.native.min_tokens=9: at most max_tokens=8 is needed"):
        compose(recipe, None, "native")
    recipe.native = NativeConfig(max_tokens=8)
    with pytest.raises(ValueError, match=r"model.native: dataset.image_mode=square makes all images the same size"):
        compose(recipe, None, None)
    recipe.anyres = AnyResConfig([[1, 2]])
    with pytest.raises(ValueError, match=r"model.anyres.grids: .* a single encoder reads"):
        compose(recipe, None, "native")


def test_a_connector_of_the_users_own_may_be_any_module(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CONNECTORS, "their_module:Theirs", nn.Linear)
    with pytest.raises(ValueError, match="allowed are identity") as refusal:
        compose(parts.recipe("dinov2", connector="pooling", options={"output_side": 1}), None, "native")
    assert "Theirs" not in str(refusal.value)


@pytest.mark.parametrize("encoder", NATIVE_ENCODERS)
def test_encoders_with_a_call_for_each_size_are_not_sharded(parts: Parts, encoder: str):
    config, processor = compose(parts.recipe(encoder), None, "native")
    assert processor.image_mode == "native"
    if encoder in ("siglip2_naflex", "qwen2_5_vl", "qwen3_vl"):
        check_same_calls(config)
    else:
        with pytest.raises(ValueError, match="ranks that shard weights"):
            check_same_calls(config)


def test_a_layer_before_the_last_is_read(parts: Parts):
    for encoder in ("siglip2_naflex", "dinov3"):
        config, _ = compose(parts.recipe(encoder, layer=-2), None, "native")
        assert config.feature_layer == 2
        kept = 2 if encoder == "siglip2_naflex" else 3
        assert config.vision_config.num_hidden_layers == kept
