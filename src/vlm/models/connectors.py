"""Connectors: what maps image features to the language model's embedding space.

Hub code: imports torch, transformers and its siblings only. To add one, write a class here or in a sibling file, add a
line to `CONNECTORS` and a YAML file in `config/model/connector/`. A class takes `vision_dim` and `text_dim` and its own
keyword options, maps `(images, features, vision_dim) -> (images, tokens, text_dim)`, and says in `num_tokens` how many
tokens come of how many features, since the processor writes that many placeholders.

Here are those that map every feature by itself; `grid_connectors.py` has those that make fewer tokens of a square grid
of patches, `query_connectors.py` those whose learned queries read the features.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .connector_parts import Connector, mlp_layers
from .grid_connectors import (
    CAbstractorConnector,
    LDPConnector,
    LDPv2Connector,
    PixelShuffleConnector,
    PoolingConnector,
)
from .query_connectors import QFormerConnector, ResamplerConnector


class IdentityConnector(Connector):
    """Features as they are, for an encoder whose width is the language model's."""

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__()
        if vision_dim != text_dim:
            raise ValueError(
                f"model.connector.type=identity needs equal widths: the visual encoder has {vision_dim}, the language "
                f"model {text_dim}. Choose model/connector=linear or mlp."
            )

    def forward(self, features: Tensor) -> Tensor:
        """Map features, see the class."""
        return features


class LinearConnector(Connector):
    """One affine map, as in LLaVA (Liu et al. 2023, arXiv:2304.08485, section 4.1)."""

    def __init__(self, vision_dim: int, text_dim: int, *, bias: bool = True, input_norm: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(vision_dim) if input_norm else nn.Identity()
        self.linear = nn.Linear(vision_dim, text_dim, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features, see the class."""
        return self.linear(self.norm(features))


class MLPConnector(Connector):
    """`num_layers` affine maps with an activation between, as in LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744).

    `num_layers=2, activation="gelu"` is its `mlp2x_gelu`. `input_norm` puts a LayerNorm before the first map, for
    encoders whose features are badly scaled.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        num_layers: int = 2,
        activation: str = "gelu",
        hidden_dim: int | None = None,
        bias: bool = True,
        input_norm: bool = False,
    ):
        super().__init__()
        self.layers = mlp_layers(
            vision_dim,
            text_dim,
            num_layers=num_layers,
            activation=activation,
            hidden_dim=hidden_dim,
            bias=bias,
            input_norm=input_norm,
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map features, see the class."""
        return self.layers(features)


def connector_class(connector_type: str) -> type[Connector]:
    """The class behind `model.connector.type`; a class of the user's own must have been added to the table."""
    if connector_type not in CONNECTORS:
        raise ValueError(
            f"model.connector.type={connector_type}: allowed are {', '.join(CONNECTORS)}, or package.module:Class for a class of "
            "your own. A checkpoint with such a class loads once you have named it in your own configuration, or with "
            "trust_remote_code=True."
        )
    return CONNECTORS[connector_type]


def connector_options(connector_type: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` without the nulls, completed with the class's own defaults.

    Raises:
        ValueError: an option that the class does not take, or one without a value and without a default.
    """
    parameters = inspect.signature(connector_class(connector_type).__init__).parameters
    taken = {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in taken:
            allowed = ", ".join(taken) or "none"
            raise ValueError(
                f"model.connector.options.{name}: {connector_type} does not take it; null leaves it out. Allowed: {allowed}"
            )
    complete = {name: given.get(name, p.default) for name, p in taken.items()}
    for name, value in complete.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"model.connector.options.{name}: {connector_type} needs a value for it")
    return complete


def count_tokens(connector_type: str, num_features: int, options: Mapping[str, Any]) -> int:
    """Tokens that one image of `num_features` features becomes; a class without `num_tokens` keeps their number."""
    count = getattr(connector_class(connector_type), "num_tokens", None)
    return count(num_features, **options) if count else num_features


def keeps_grid(connector_type: str) -> bool:
    """Whether the tokens of a connector stand row by row as features do; so do those of a class that does not say."""
    return getattr(connector_class(connector_type), "keeps_grid", True)


CONNECTORS: dict[str, type[Connector]] = {
    "identity": IdentityConnector,
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "pixel_shuffle": PixelShuffleConnector,
    "pooling": PoolingConnector,
    "c_abstractor": CAbstractorConnector,
    "ldp": LDPConnector,
    "ldp_v2": LDPv2Connector,
    "resampler": ResamplerConnector,
    "qformer": QFormerConnector,
}
