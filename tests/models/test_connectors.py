"""Connectors: shapes, counts and options, for every row of the table."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from vlm.models.connectors import CONNECTORS, Connector, connector_class, connector_options, count_tokens

REQUIRED: dict[str, dict[str, Any]] = {}
"""Options without a default, by connector."""


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_connector_gives_the_tokens_that_it_says(kind: str):
    """`(images, features, vision_dim) -> (images, tokens, text_dim)`, with gradients to its input."""
    vision_dim, text_dim, features = 16, 16 if kind == "identity" else 24, 36
    options = connector_options(kind, REQUIRED.get(kind, {}))
    connector = CONNECTORS[kind](vision_dim, text_dim, **options)
    inputs = torch.randn(2, features, vision_dim, requires_grad=True)
    outputs = connector(inputs)
    assert outputs.shape == (2, count_tokens(kind, features, options), text_dim)
    outputs.square().sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in connector.parameters())


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_connector_keeps_images_apart(kind: str):
    connector = CONNECTORS[kind](16, 16, **connector_options(kind, REQUIRED.get(kind, {}))).eval()
    inputs = torch.randn(3, 36, 16)
    with torch.no_grad():
        assert torch.allclose(connector(inputs)[1:2], connector(inputs[1:2]), atol=1e-6)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_option_is_keyword_only(kind: str):
    """So that YAML options are checked against the signature."""
    assert issubclass(CONNECTORS[kind], Connector)
    with pytest.raises(ValueError, match=rf"model.connector.options.nonsense: {kind} does not take it"):
        connector_options(kind, {"nonsense": 1})


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
