"""Connectors that turn a square grid of patches into a smaller grid of tokens.

Hub code: imports torch and its siblings only. Each needs features that are patches alone
(`model.visual_encoder.feature_strategy=patch`); tokens are in row-major order, as the features are.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .connector_parts import (
    Convolution,
    GridConnector,
    SqueezeExcitation,
    from_grid,
    mlp_layers,
    require_divisor,
    require_output_side,
    require_positive,
    to_grid,
)
from .native import Grid, square_order


class PixelShuffleConnector(GridConnector):
    """Space to depth, then an MLP: squares of `factor` x `factor` features are concatenated into one token.

    `factor**2` times fewer tokens, and nothing is averaged away (Shi et al. 2016, arXiv:1609.05158, backwards). The
    default is that of InternVL 1.5 (Chen et al. 2024, arXiv:2404.16821): LayerNorm, two maps, GELU.
    `num_layers=1, bias=False, input_norm=False` is that of Idefics3 (Laurençon et al. 2024, arXiv:2408.12637), SmolVLM
    (Marafioti et al. 2025, arXiv:2504.05299) and nanoVLM. Channels are in their order: row, column, width.

    Options:
        factor: side of the square of features that becomes one token; divides the side of the grid.
        num_layers, activation, hidden_dim, bias: of the MLP, see `MLPConnector`.
        input_norm: LayerNorm over the concatenated features.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        factor: int = 2,
        num_layers: int = 2,
        activation: str = "gelu",
        hidden_dim: int | None = None,
        bias: bool = True,
        input_norm: bool = True,
    ):
        super().__init__()
        require_positive(factor=factor)
        self.factor = factor
        input_dim = vision_dim * factor**2
        self.layers = mlp_layers(input_dim, text_dim, num_layers, activation, hidden_dim, bias, input_norm)

    @classmethod
    def output_side(cls, side: int, *, factor: int, **options: object) -> int:
        """Side of the grid of tokens, see `GridConnector`."""
        require_divisor("factor", factor, side)
        return side // factor

    @classmethod
    def square_side(cls, *, factor: int, **options: object) -> int | None:
        """Return the side of the square that becomes one token."""
        require_positive(factor=factor)
        return factor

    def map_native(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Map the features of images of different sizes, see `Connector`."""
        squares = features[square_order(grids, self.factor, features.device)].unflatten(0, (-1, self.factor**2))
        return self.layers(squares.flatten(1))

    def shuffle(self, features: Tensor) -> Tensor:
        """`(images, features, vision_dim) -> (images, features / factor**2, factor**2 * vision_dim)`."""
        side = math.isqrt(features.shape[1]) // self.factor
        squares = features.unflatten(1, (side, self.factor, side, self.factor)).transpose(2, 3)
        return squares.flatten(3).flatten(1, 2)  # (images, side, side, factor, factor, width) before

    def forward(self, features: Tensor) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`."""
        return self.layers(self.shuffle(features))


class PoolingConnector(GridConnector):
    """Averages of neighbouring features, then an MLP.

    With `output_side` it is DeCo's adaptive pooling (Yao et al. 2024, arXiv:2405.20985), to that many tokens a side
    whatever the encoder gives; with `kernel`, pooling of squares as Gemma 3 has it (arXiv:2503.19786, before a norm and
    one map without bias). Exactly one of the two is to be given.

    Options:
        kernel: side of the square of features that is averaged into one token; divides the side of the grid.
        output_side: side of the grid of tokens; at most that of the features.
        num_layers, activation, hidden_dim, bias: of the MLP, see `MLPConnector`.
        input_norm: LayerNorm over the averages.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        kernel: int | None = None,
        output_side: int | None = None,
        num_layers: int = 2,
        activation: str = "gelu",
        hidden_dim: int | None = None,
        bias: bool = True,
        input_norm: bool = False,
    ):
        super().__init__()
        _require_one_size(kernel, output_side)
        self.kernel = kernel
        self.pool = nn.AdaptiveAvgPool2d(output_side) if kernel is None else nn.AvgPool2d(kernel)
        self.layers = mlp_layers(vision_dim, text_dim, num_layers, activation, hidden_dim, bias, input_norm)

    @classmethod
    def output_side(cls, side: int, *, kernel: int | None, output_side: int | None, **options: object) -> int:
        """Side of the grid of tokens, see `GridConnector`."""
        _require_one_size(kernel, output_side)
        if output_side is not None:
            require_output_side(output_side, side)
            return output_side
        assert kernel is not None
        require_divisor("kernel", kernel, side)
        return side // kernel

    @classmethod
    def square_side(cls, *, kernel: int | None, output_side: int | None, **options: object) -> int | None:
        """Return the side of the squares that are averaged; None with `output_side`, which needs a square grid."""
        _require_one_size(kernel, output_side)
        return kernel

    def map_native(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Map the features of images of different sizes, see `Connector`."""
        assert self.kernel is not None
        squares = features[square_order(grids, self.kernel, features.device)].unflatten(0, (-1, self.kernel**2))
        return self.layers(squares.mean(1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`."""
        return self.layers(from_grid(self.pool(to_grid(features))))


def _require_one_size(kernel: int | None, output_side: int | None) -> None:
    """Raise ValueError unless exactly one of the two sizes of a pooling is given."""
    sizes = {name: size for name, size in (("kernel", kernel), ("output_side", output_side)) if size is not None}
    if len(sizes) != 1:
        raise ValueError(
            f"model.connector.options.kernel={kernel}, model.connector.options.output_side={output_side}: exactly one "
            "of them is needed. kernel=2 averages squares of 2 x 2 features; output_side=12 makes 12 x 12 tokens"
        )
    require_positive(**sizes)


class CAbstractorConnector(GridConnector):
    """Honeybee's C-Abstractor (Cha et al. 2024, arXiv:2312.06742): convolutions around a pooling.

    A learned position is added to each feature; features go through `num_blocks` RegNet blocks, are averaged to a grid
    of `num_queries` tokens, then go through as many blocks again and an MLP with SiLU. The default sizes are the
    paper's for 7B. Weights are initialised as PyTorch's layers.

    Options:
        num_queries: tokens of an image: a square number, at most as many as there are features.
        num_blocks: blocks before the pooling, and again after it.
        hidden_dim: width of the blocks.
        num_layers: maps of the MLP.
        position_side: side of the grid of learned positions, ideally the encoder's own: 24 for CLIP ViT-L/14 at 336
            pixels. For another grid of features they are resized, as in vision transformers.
        input_norm: LayerNorm over the features, before the positions.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        num_queries: int = 144,
        num_blocks: int = 3,
        hidden_dim: int = 1024,
        num_layers: int = 2,
        position_side: int = 24,
        input_norm: bool = False,
    ):
        super().__init__()
        require_positive(num_blocks=num_blocks, hidden_dim=hidden_dim, position_side=position_side)
        side = _square_root(num_queries)
        self.input_norm = nn.LayerNorm(vision_dim) if input_norm else nn.Identity()
        self.positions = GridPositions(position_side, vision_dim)
        self.before = nn.Sequential(
            BottleneckBlock(vision_dim, hidden_dim),
            *[BottleneckBlock(hidden_dim, hidden_dim) for _ in range(num_blocks - 1)],
        )
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.after = nn.Sequential(*[BottleneckBlock(hidden_dim, hidden_dim) for _ in range(num_blocks)])
        self.layers = mlp_layers(hidden_dim, text_dim, num_layers, "silu")

    @classmethod
    def output_side(cls, side: int, *, num_queries: int, **options: object) -> int:
        """Side of the grid of tokens, see `GridConnector`."""
        tokens_side = _square_root(num_queries)
        if tokens_side > side:
            raise ValueError(
                f"model.connector.options.num_queries={num_queries}: the visual encoder gives {side**2} features. "
                f"Allowed: square numbers up to {side**2}"
            )
        return tokens_side

    def forward(self, features: Tensor) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`."""
        grid = to_grid(self.positions(self.input_norm(features)))
        return self.layers(from_grid(self.after(self.pool(self.before(grid)))))


def _square_root(num_queries: int) -> int:
    """Side of a grid of `num_queries` tokens."""
    require_positive(num_queries=num_queries)
    side = math.isqrt(num_queries)
    if side**2 != num_queries:
        raise ValueError(
            f"model.connector.options.num_queries={num_queries}: the tokens are a square grid. Choose a square number, "
            f"such as {side**2} or {(side + 1) ** 2}"
        )
    return side


class GridPositions(nn.Module):
    """A learned vector for every place of a grid is added to the features; shape kept.

    Where the features' grid is not `side` x `side`, the vectors are resized to it.
    """

    def __init__(self, side: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(side**2, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small vectors, as Honeybee begins with."""
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """Add positions: `(images, features, width) -> (images, features, width)`."""
        if features.shape[1] == self.weight.shape[0]:
            return features + self.weight
        side = math.isqrt(features.shape[1])
        grid = to_grid(self.weight[None].float())  # resizing is exact in float32 alone
        resized = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        return features + from_grid(resized).to(features.dtype)


class BottleneckBlock(nn.Module):
    """A RegNetY block (Radosavovic et al. 2020, arXiv:2003.13678) with LayerNorm and SiLU, as timm's RegStage has it.

    `(images, input_dim, side, side) -> (images, output_dim, side, side)`. The bottleneck is as wide as the output and
    its 3 x 3 convolution goes channel by channel: Honeybee leaves timm's defaults (ratio 1, groups of 1) as they are.
    """

    def __init__(self, input_dim: int, output_dim: int):
        super().__init__()
        self.reduce = Convolution(input_dim, output_dim, nn.SiLU())
        self.mix = Convolution(output_dim, output_dim, nn.SiLU(), kernel=3, groups=output_dim)
        self.squeeze = SqueezeExcitation(output_dim, max(round(input_dim * 0.25), 1), nn.SiLU(), nn.Sigmoid())
        self.expand = Convolution(output_dim, output_dim)
        self.shortcut = nn.Identity() if input_dim == output_dim else Convolution(input_dim, output_dim)
        self.activation = nn.SiLU()

    def forward(self, grid: Tensor) -> Tensor:
        """Map a grid, see the class."""
        return self.activation(self.expand(self.squeeze(self.mix(self.reduce(grid)))) + self.shortcut(grid))


class LDPConnector(GridConnector):
    """MobileVLM's lightweight downsample projector (Chu et al. 2023, arXiv:2312.16886).

    An MLP of two maps with GELU, then two of MobileNetV3's blocks, of which the second halves the sides of the grid
    (rounded up): 4 times fewer tokens. As in its code, the norms are LayerNorm, not BatchNorm.

    Options:
        input_norm: LayerNorm over the features, which the paper does not have.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, input_norm: bool = False):
        super().__init__()
        self.layers = mlp_layers(vision_dim, text_dim, input_norm=input_norm)
        self.blocks = nn.Sequential(DepthwiseBlock(text_dim, stride=1), DepthwiseBlock(text_dim, stride=2))

    @classmethod
    def output_side(cls, side: int, **options: object) -> int:
        """Side of the grid of tokens, see `GridConnector`."""
        return (side + 1) // 2

    def forward(self, features: Tensor) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`."""
        return from_grid(self.blocks(to_grid(self.layers(features))))


class DepthwiseBlock(nn.Module):
    """MobileNetV3's block (Howard et al. 2019, arXiv:1905.02244) with LayerNorm, without expansion.

    `(images, width, side, side) -> (images, width, side / stride, side / stride)`; a shortcut where the side stays.
    """

    def __init__(self, width: int, *, stride: int):
        super().__init__()
        self.depthwise = Convolution(width, width, nn.Hardswish(), kernel=3, stride=stride, groups=width)
        # torchvision's rounding to a multiple of 8 changes no quarter of a language model's width
        self.squeeze = SqueezeExcitation(width, max(width // 4, 8), nn.ReLU(), nn.Hardsigmoid())
        self.project = Convolution(width, width)
        self.has_shortcut = stride == 1

    def forward(self, grid: Tensor) -> Tensor:
        """Map a grid, see the class."""
        mapped = self.project(self.squeeze(self.depthwise(grid)))
        return mapped + grid if self.has_shortcut else mapped


class LDPv2Connector(GridConnector):
    """MobileVLM V2's projector (Chu et al. 2024, arXiv:2402.03766): MLP, pooling, positions.

    An MLP of two maps with GELU, adaptive average pooling to `output_side` x `output_side` tokens, and a 3 x 3
    depthwise convolution with a shortcut, which tells each token where it is (Chu et al. 2021, arXiv:2102.10882).

    Options:
        output_side: side of the grid of tokens; at most that of the features.
        input_norm: LayerNorm over the features, which the paper does not have.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, output_side: int = 12, input_norm: bool = False):
        super().__init__()
        require_positive(output_side=output_side)
        self.layers = mlp_layers(vision_dim, text_dim, input_norm=input_norm)
        self.pool = nn.AdaptiveAvgPool2d(output_side)
        self.positions = nn.Conv2d(text_dim, text_dim, 3, padding=1, groups=text_dim)

    @classmethod
    def output_side(cls, side: int, *, output_side: int, **options: object) -> int:
        """Side of the grid of tokens, see `GridConnector`."""
        require_output_side(output_side, side)
        return output_side

    def forward(self, features: Tensor) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`."""
        grid = self.pool(to_grid(self.layers(features)))
        return from_grid(self.positions(grid) + grid)
