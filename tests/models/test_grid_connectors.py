"""Connectors on a grid, against other people's modules with the same weights, and against what an image shows."""

from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from timm.layers.norm_act import LayerNormAct2d
from timm.models.regnet import RegStage
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.ops.misc import SqueezeExcitation
from transformers import Idefics3Config, InternVLConfig, InternVLModel, SmolVLMConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Config, Gemma3MultiModalProjector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from vlm.models.connector_parts import GridConnector, from_grid, to_grid
from vlm.models.connectors import CONNECTORS, connector_options

VISION_DIM, TEXT_DIM, SIDE = 16, 64, 6


def connector(kind: str, **options: Any) -> Any:
    """One with random norms too, so that a norm in a wrong place shows."""
    made = CONNECTORS[kind](VISION_DIM, TEXT_DIM, **connector_options(kind, options))
    for parameter in made.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5)
    return made.eval()


def copy_weights(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """Weights in the order in which both declare them; shapes must agree."""
    pairs = list(zip(theirs.parameters(), ours.parameters(), strict=True))
    with torch.no_grad():
        for one, other in pairs:
            assert one.shape == other.shape
            one.copy_(other)
    return theirs.eval()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, SIDE**2, VISION_DIM)


@torch.no_grad()
def have_equal_outputs(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-5)


# Grids


def test_a_grid_is_read_row_by_row():
    grid = to_grid(torch.arange(6 * 6).float()[None, :, None])
    assert grid.shape == (1, 1, 6, 6)
    assert grid[0, 0, 1].tolist() == [6, 7, 8, 9, 10, 11]
    assert from_grid(grid).flatten().tolist() == list(range(36))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("pixel_shuffle", {"factor": 3}),
        ("pooling", {"kernel": 3}),
        ("pooling", {"output_side": 2}),
    ],
)
def test_a_token_reads_its_own_square(kind: str, options: dict[str, Any]):
    """The token at row 0, column 1 depends on features of rows 0 to 2 and columns 3 to 5, and on no others."""
    inputs = torch.randn(1, SIDE**2, VISION_DIM, requires_grad=True)
    connector(kind, **options)(inputs)[0, 1].square().sum().backward()
    read = inputs.grad[0].abs().sum(1).unflatten(0, (SIDE, SIDE)) > 0
    assert read[:3, 3:].all()
    assert read.sum() == 9


@pytest.mark.parametrize("kind", [kind for kind, one in CONNECTORS.items() if issubclass(one, GridConnector)])
def test_a_mirrored_image_is_another(kind: str, features: torch.Tensor):
    """Where a feature stands makes a difference, of rows and of columns."""
    options = {
        "pooling": {"kernel": 3},
        "c_abstractor": {"num_queries": 4, "num_blocks": 1},
        "ldp_v2": {"output_side": 2},
    }
    made = connector(kind, **options.get(kind, {}))
    for flipped in ((2,), (3,), (2, 3)):
        other = made(from_grid(to_grid(features).flip(flipped)))
        assert not torch.allclose(made(features), other, atol=1e-3)


# Pixel shuffle


@pytest.mark.parametrize(("config", "theirs"), [(Idefics3Config, Idefics3Connector), (SmolVLMConfig, SmolVLMConnector)])
def test_pixel_shuffle_of_one_map_is_smolvlms(config: Any, theirs: Any, features: torch.Tensor):
    ours = connector("pixel_shuffle", factor=3, num_layers=1, bias=False, input_norm=False)
    settings = config(scale_factor=3)
    settings.vision_config.hidden_size, settings.text_config.hidden_size = VISION_DIM, TEXT_DIM
    module = copy_weights(theirs(settings), ours)
    assert torch.equal(module.pixel_shuffle(features, 3), ours.shuffle(features))
    assert have_equal_outputs(module(features), ours(features))


def test_pixel_shuffle_by_default_is_internvls(features: torch.Tensor):
    ours = connector("pixel_shuffle")
    settings = InternVLConfig(downsample_ratio=0.5)
    settings.vision_config.hidden_size, settings.text_config.hidden_size = VISION_DIM, TEXT_DIM
    module = copy_weights(InternVLMultiModalProjector(settings), ours)
    shuffled = InternVLModel.pixel_shuffle(None, features.unflatten(1, (SIDE, SIDE)), 0.5).flatten(1, 2)
    assert have_equal_outputs(module(shuffled), ours(features))


# Pooling


def test_pooling_averages_as_gemma3_does(features: torch.Tensor):
    """The averages alone: its norm is another."""
    settings = Gemma3Config(mm_tokens_per_image=9)
    settings.vision_config.hidden_size, settings.text_config.hidden_size = VISION_DIM, TEXT_DIM
    settings.vision_config.image_size, settings.vision_config.patch_size = 6 * 14, 14
    theirs = Gemma3MultiModalProjector(settings).avg_pool(features.transpose(1, 2).reshape(2, VISION_DIM, SIDE, SIDE))
    ours = connector("pooling", kernel=2)
    assert have_equal_outputs(ours.layers(theirs.flatten(2).transpose(1, 2)), ours(features))


def test_both_poolings_are_one_where_the_sides_divide(features: torch.Tensor):
    squares, adaptive = connector("pooling", kernel=2), connector("pooling", output_side=3)
    adaptive.load_state_dict(squares.state_dict())
    assert have_equal_outputs(squares(features), adaptive(features))
    assert connector("pooling", output_side=4)(features).shape == (2, 16, TEXT_DIM)


# C-Abstractor


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_the_c_abstractor_is_honeybees(num_blocks: int, features: torch.Tensor):
    """As its code builds it: timm's stages around an adaptive pooling, then an MLP with SiLU."""
    hidden_dim = 8
    ours = connector("c_abstractor", num_queries=9, num_blocks=num_blocks, hidden_dim=hidden_dim, position_side=SIDE)
    stage = partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=TimmLayerNorm2d)
    before = copy_weights(stage(num_blocks, VISION_DIM, hidden_dim), ours.before)
    after = copy_weights(stage(num_blocks, hidden_dim, hidden_dim), ours.after)
    mlp = nn.Sequential(nn.Linear(hidden_dim, TEXT_DIM), nn.SiLU(), nn.Linear(TEXT_DIM, TEXT_DIM))
    readout = copy_weights(mlp, ours.layers)
    placed = (features + ours.positions.weight).transpose(1, 2).reshape(2, VISION_DIM, SIDE, SIDE)
    tokens = after(nn.AdaptiveAvgPool2d(3)(before(placed))).flatten(2).transpose(1, 2)
    assert have_equal_outputs(readout(tokens), ours(features))


def test_positions_are_resized_to_the_grid(features: torch.Tensor):
    """A vector that grows from left to right still does; small at the start."""
    positions = connector("c_abstractor", num_blocks=1, hidden_dim=8).positions
    assert positions.weight.shape == (24 * 24, VISION_DIM)
    assert 0.01 < positions.weight.std() < 0.03
    with torch.no_grad():
        positions.weight.copy_(torch.arange(24.0).repeat(24)[:, None].expand(-1, VISION_DIM))
        added = positions(torch.zeros(1, SIDE**2, VISION_DIM)).unflatten(1, (SIDE, SIDE))
    assert torch.allclose(added, added[:, :1].expand_as(added), atol=1e-4)  # equal in all rows
    assert (added[0, 0].diff(dim=0) > 3).all()


# LDP


def their_block(stride: int) -> nn.Module:
    """A block as MobileVLM's code builds it out of torchvision and timm."""
    return InvertedResidual(
        InvertedResidualConfig(TEXT_DIM, 3, TEXT_DIM, TEXT_DIM, True, "HS", stride, 1, 1),
        partial(LayerNormAct2d, act_layer=None),
        partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid),
    )


@pytest.mark.parametrize("side", [6, 5])
def test_ldp_is_mobilevlms(side: int):
    features = torch.randn(2, side**2, VISION_DIM)
    ours = connector("ldp")
    mlp = copy_weights(
        nn.Sequential(nn.Linear(VISION_DIM, TEXT_DIM), nn.GELU(), nn.Linear(TEXT_DIM, TEXT_DIM)), ours.layers
    )
    blocks = copy_weights(nn.Sequential(their_block(1), their_block(2)), ours.blocks)
    grid = mlp(features).permute(0, 2, 1).reshape(2, TEXT_DIM, side, side)
    assert have_equal_outputs(blocks(grid).flatten(2).permute(0, 2, 1), ours(features))
    assert ours(features).shape[1] == CONNECTORS["ldp"].num_tokens(side**2) == 9


def test_ldp_v2_is_mobilevlm_v2s(features: torch.Tensor):
    ours = connector("ldp_v2", output_side=4)
    mlp = copy_weights(
        nn.Sequential(nn.Linear(VISION_DIM, TEXT_DIM), nn.GELU(), nn.Linear(TEXT_DIM, TEXT_DIM)), ours.layers
    )
    peg = copy_weights(nn.Conv2d(TEXT_DIM, TEXT_DIM, 3, 1, 1, bias=True, groups=TEXT_DIM), ours.positions)
    grid = nn.AdaptiveAvgPool2d((4, 4))(mlp(features).permute(0, 2, 1).reshape(2, TEXT_DIM, SIDE, SIDE))
    assert have_equal_outputs((peg(grid) + grid).flatten(2).transpose(1, 2), ours(features))
