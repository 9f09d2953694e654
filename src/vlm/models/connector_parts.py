"""Building blocks of connectors: base classes, checks of options, the MLP, convolutions on a grid.

Hub code: imports torch, transformers and its siblings only. Blocks of a single connector are in its own file.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .native import Grid


class Connector(nn.Module):
    """The base class of connectors: `(images, features, vision_dim) -> (images, tokens, text_dim)`.

    A subclass takes `vision_dim`, `text_dim` and keyword options of its own, which `num_tokens` gets too.
    """

    keeps_grid: ClassVar[bool] = True
    """Whether tokens are in a grid, row by row, as the features are; tiles of images need that (`anyres.py`)."""

    @classmethod
    def num_tokens(cls, num_features: int, **options: object) -> int:
        """Return the number of tokens for an image of `num_features` features: by default as many."""
        return num_features

    @classmethod
    def square_side(cls, **options: object) -> int | None:
        """Return the side of the square of patches that becomes one token of an image at native resolution.

        None: the connector reads images of one size alone, which is the default. See `map_native`.
        """
        return None

    def map_native(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Map the features of images at native resolution, which a connector with a `square_side` can.

        `(N, vision_dim) -> (tokens, text_dim)`: the N patches of all images, row by row and image by image; `grids` are
        the rows and columns of each, multiples of `square_side`.
        """
        raise NotImplementedError


class PointwiseConnector(Connector):
    """A connector that maps every feature by itself."""

    @classmethod
    def square_side(cls, **options: object) -> int | None:
        """Return 1: each patch becomes a token."""
        return 1

    def map_native(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Map the features of images of different sizes, see `Connector`."""
        return self(features[None])[0]


class GridConnector(Connector):
    """A connector that reads the features of an image as a square grid of patches, row by row.

    A subclass returns from `output_side` the side of the grid of tokens for that of the features.
    """

    @classmethod
    def num_tokens(cls, num_features: int, **options: object) -> int:
        """Return the number of tokens for an image of `num_features` features.

        Raises:
            ValueError: the features are no square grid, or the options do not fit the grid.
        """
        side = math.isqrt(num_features)
        if side**2 != num_features:
            raise ValueError(
                f"model.connector.type: {cls.__name__} reads the features of an image as a square grid of patches, and "
                f"{num_features} features are none: {side} x {side} and {num_features - side**2} more, such as a CLS "
                "token or registers. Choose model.visual_encoder.feature_strategy=patch; where the patches themselves "
                "are no square, a connector that needs none, such as mlp, resampler or qformer."
            )
        return cls.output_side(side, **options) ** 2

    @classmethod
    def output_side(cls, side: int, **options: object) -> int:
        """Return the side of the grid of tokens for a grid of `side` x `side` features.

        Raises:
            ValueError: the options do not fit the grid.
        """
        raise NotImplementedError


def require_positive(**options: object) -> None:
    """Raise ValueError for the first option that is not a whole number of at least 1."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"model.connector.options.{name}={value}: a whole number is needed")
        if value < 1:
            raise ValueError(f"model.connector.options.{name}={value}: at least 1 is needed")


def require_divisor(name: str, value: int, side: int) -> None:
    """Raise ValueError where an option does not divide the side of the grid of features."""
    require_positive(**{name: value})
    if side % value:
        raise ValueError(
            f"model.connector.options.{name}={value}: the visual encoder gives a grid of {side} x {side} features, "
            f"which it does not divide. Allowed: {divisors(side)}"
        )


def require_output_side(output_side: int, side: int) -> None:
    """Raise ValueError where the grid of tokens is larger than that of the features."""
    require_positive(output_side=output_side)
    if output_side > side:
        raise ValueError(
            f"model.connector.options.output_side={output_side}: the visual encoder gives a grid of {side} x {side} "
            f"features, which is smaller. Allowed: 1 to {side}"
        )


def require_heads(num_heads: int, hidden_dim: int) -> None:
    """Raise ValueError where the number of attention heads does not divide the width."""
    require_positive(num_heads=num_heads, hidden_dim=hidden_dim)
    if hidden_dim % num_heads:
        raise ValueError(
            f"model.connector.options.num_heads={num_heads}: hidden_dim={hidden_dim} is not divisible by it. "
            f"Allowed: {divisors(hidden_dim, most=64)}; or choose another model.connector.options.hidden_dim"
        )


def divisors(number: int, most: int | None = None) -> str:
    """List the divisors of a number, from 1 to `most` or itself."""
    largest = number if most is None else min(number, most)
    return ", ".join(str(divisor) for divisor in range(1, largest + 1) if number % divisor == 0)


def require_activation(activation: str) -> None:
    """Raise ValueError where transformers does not know the activation."""
    if activation not in ACT2FN:
        raise ValueError(f"model.connector.options.activation={activation}: allowed are {', '.join(sorted(ACT2FN))}")


def mlp_layers(
    input_dim: int,
    output_dim: int,
    num_layers: int = 2,
    activation: str = "gelu",
    hidden_dim: int | None = None,
    bias: bool = True,
    input_norm: bool = False,
) -> nn.Sequential:
    """`num_layers` affine maps with an activation between: `(…, input_dim) -> (…, output_dim)`.

    Args:
        input_dim: width of the input.
        output_dim: width of the output.
        num_layers: number of affine maps.
        activation: a name of transformers' activations.
        hidden_dim: width in between; None: `output_dim`.
        bias: whether the maps have a bias.
        input_norm: whether a LayerNorm comes first.

    Raises:
        ValueError: an option has an invalid value.
    """
    require_positive(num_layers=num_layers)
    require_activation(activation)
    layers: list[nn.Module] = [nn.LayerNorm(input_dim)] if input_norm else []
    widths = [input_dim, *[hidden_dim or output_dim] * (num_layers - 1), output_dim]
    for wide, next_wide in pairwise(widths):
        layers += [nn.Linear(wide, next_wide, bias=bias), ACT2FN[activation]]
    return nn.Sequential(*layers[:-1])  # no activation behind the last map


def to_grid(features: Tensor) -> Tensor:
    """`(images, side * side, width) -> (images, width, side, side)`."""
    side = math.isqrt(features.shape[1])
    return features.transpose(1, 2).unflatten(2, (side, side))


def from_grid(grid: Tensor) -> Tensor:
    """`(images, width, side, side) -> (images, side * side, width)`."""
    return grid.flatten(2).transpose(1, 2)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the width at every position of a grid: `(images, width, side, side)`, shape kept.

    A kind of `nn.LayerNorm`, so that Trainer leaves it out of weight decay.
    """

    def forward(self, grid: Tensor) -> Tensor:
        """Normalise, see the class."""
        normed = F.layer_norm(grid.movedim(1, 3), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.movedim(3, 1)


class Convolution(nn.Sequential):
    """A convolution without bias, LayerNorm, and an activation where one is given.

    `(images, input_dim, side, side) -> (images, output_dim, side, side)`, sides halved (rounded up) by `stride=2`.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        activation: nn.Module | None = None,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
    ):
        padding = kernel // 2
        convolution = nn.Conv2d(input_dim, output_dim, kernel, stride, padding, groups=groups, bias=False)
        last = [] if activation is None else [activation]
        super().__init__(convolution, LayerNorm2d(output_dim), *last)


class SqueezeExcitation(nn.Module):
    """Scales every channel by what the whole grid holds (Hu et al. 2018, arXiv:1709.01507); shape kept.

    `grid * gate(expand(activation(reduce(mean))))`, where `mean` is each channel's: `(images, width, side, side)`.
    """

    def __init__(self, width: int, squeezed_dim: int, activation: nn.Module, gate: nn.Module):
        super().__init__()
        self.reduce = nn.Conv2d(width, squeezed_dim, 1)
        self.activation = activation
        self.expand = nn.Conv2d(squeezed_dim, width, 1)
        self.gate = gate

    def forward(self, grid: Tensor) -> Tensor:
        """Scale, see the class."""
        means = grid.mean((2, 3), keepdim=True)  # (images, width, 1, 1)
        return grid * self.gate(self.expand(self.activation(self.reduce(means))))
