"""Encoders stop at the layer that is read: the same features bit by bit, fewer layers run, nothing changed in them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    DeiTConfig,
    DeiTModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from tests.tiny_parts import ENCODERS, Parts
from vlm.models.encoders import EARLY_EXIT_TYPES, flatten_feature_map, read_features

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
EXTRA_ENCODERS = {
    "vit": lambda: ViTModel(ViTConfig(**SIZES)),
    "deit": lambda: DeiTModel(DeiTConfig(**SIZES)),
    "ijepa": lambda: IJepaModel(IJepaConfig(**SIZES)),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES)),
}
NAMES = [*ENCODERS, *EXTRA_ENCODERS]


@pytest.fixture(params=NAMES)
def encoder(request: pytest.FixtureRequest, parts: Parts) -> PreTrainedModel:
    """Each kind of encoder, whole."""
    if request.param in EXTRA_ENCODERS:
        return EXTRA_ENCODERS[request.param]().eval()
    return AutoModel.from_pretrained(parts.encoder(request.param)).eval()


def pixels(encoder: PreTrainedModel) -> Tensor:
    side = 32 if hasattr(encoder, "timm_model") else encoder.config.image_size
    return torch.randn(2, 3, side, side)


def all_hidden_states(encoder: PreTrainedModel, given: Tensor) -> list[Tensor]:
    """All hidden states, of a run to the end."""
    return list(encoder(given, output_hidden_states=True, return_dict=True).hidden_states)


def find_blocks(encoder: Any) -> nn.ModuleList | nn.Sequential:
    """What runs one after the other."""
    if hasattr(encoder, "timm_model"):
        return encoder.timm_model.blocks
    lists = [one for one in encoder.modules() if isinstance(one, nn.ModuleList) and len(one) == 3]
    assert len(lists) == 1
    return lists[0]


@torch.no_grad()
def test_features_are_those_of_the_whole_run(encoder: PreTrainedModel):
    """Each layer by itself, and several; also after a first call that was stopped."""
    given = pixels(encoder)
    stopped = read_features(encoder, given, 1, "full", 0)
    states = [flatten_feature_map(state) for state in all_hidden_states(encoder, given)]
    torch.testing.assert_close(stopped, states[1], rtol=0, atol=0)
    for layer, state in enumerate(states):
        torch.testing.assert_close(read_features(encoder, given, layer, "full", 0), state, rtol=0, atol=0)
    if states[0].shape[1] == states[2].shape[1]:
        several = read_features(encoder, given, [2, 0], "full", 0)
        torch.testing.assert_close(several, torch.cat([states[2], states[0]], dim=2), rtol=0, atol=0)


@torch.no_grad()
def test_layers_behind_it_are_not_run_and_stay_where_they_are(encoder: PreTrainedModel):
    assert hasattr(encoder, "timm_model") or encoder.config.model_type in EARLY_EXIT_TYPES
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    modules = dict(encoder.named_modules())
    layers = find_blocks(encoder)
    run: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *given, number=number: run.append(number))
    read_features(encoder, pixels(encoder), 1, "full", 0)
    assert run
    assert len(run) < len(layers), "all layers were run"
    assert run == list(range(len(run)))
    assert dict(encoder.named_modules()) == modules, "the model is another one afterwards"
    run.clear()
    all_hidden_states(encoder, pixels(encoder))
    assert len(run) == len(layers)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_encoders_get_the_same_gradients(parts: Parts, checkpointing: bool):
    """With activation checkpointing, too; what lies behind has none."""
    found = []
    given = torch.randn(2, 3, 32, 32)
    for stops in (True, False):
        encoder = AutoModel.from_pretrained(parts.encoder("dinov2")).train()
        if checkpointing:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        features = read_features(encoder, given, 2, "full", 0) if stops else all_hidden_states(encoder, given)[2]
        features.square().sum().backward()
        found.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert not any("layer.2." in name for name in found[0])
    for name, slope in found[0].items():
        torch.testing.assert_close(slope, found[1][name], rtol=0, atol=0)


def test_an_error_leaves_the_encoder_whole(parts: Parts):
    encoder = AutoModel.from_pretrained(parts.encoder("dinov2")).eval()
    with pytest.raises(ValueError, match="channel"):
        read_features(encoder, torch.randn(2, 5, 32, 32), 1, "full", 0)
    assert type(find_blocks(encoder)) is nn.ModuleList


def test_what_is_composed_keeps_the_layers_that_it_does_not_run(parts: Parts):
    """A checkpoint holds the whole encoder."""
    model, _ = parts.model("dinov2", "llama", layer=-3)
    run: list[Any] = []
    encoder: Any = model.visual_encoder
    for layer in encoder.encoder.layer:
        layer.register_forward_hook(lambda *given: run.append(given[0]))
    model.get_image_features(torch.randn(2, 3, 16, 16))
    assert len(run) == 1
    assert sum(".layer.2." in name for name in model.state_dict()) > 10
