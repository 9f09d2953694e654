"""Connectors: modules that map image features to the language model's embedding space.

Hub code: imports torch, transformers and its siblings only. To add one, write a class here or in a sibling file, add a
line to `CONNECTORS` and a YAML file in `config/model/connector/`. A class takes `vision_dim` and `text_dim` and its own
keyword options, maps `(images, features, vision_dim) -> (images, tokens, text_dim)`, and returns from `num_tokens` the
number of tokens for a number of features, since the processor writes as many placeholders.

The connectors here map every feature by itself, those of `grid_connectors.py` turn a square grid of patches into fewer
tokens, and those of `query_connectors.py` read the features with learned queries.
"""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from .connector_parts import Connector, PointwiseConnector, mlp_layers
from .grid_connectors import CAbstractorConnector, LDPConnector, LDPv2Connector, PixelShuffleConnector, PoolingConnector
from .query_connectors import QFormerConnector, ResamplerConnector


class IdentityConnector(PointwiseConnector):
    """Returns features unchanged, for an encoder as wide as the language model.

    Raises:
        ValueError: the widths differ.
    """

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__()
        if vision_dim != text_dim:
            raise ValueError(
                f"model.connector.type=identity needs equal widths: the visual encoder has {vision_dim}, the language "
                f"model {text_dim}. Choose model/connector=linear or mlp."
            )

    def forward(self, features: Tensor) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`."""
        return features


class LinearConnector(PointwiseConnector):
    """One affine map, as in LLaVA (Liu et al. 2023, arXiv:2304.08485, section 4.1).

    Options:
        bias: whether the map has a bias.
        input_norm: LayerNorm over the features.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, bias: bool = True, input_norm: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(vision_dim) if input_norm else nn.Identity()
        self.linear = nn.Linear(vision_dim, text_dim, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`."""
        return self.linear(self.norm(features))


class MLPConnector(PointwiseConnector):
    """`num_layers` affine maps with an activation between, as in LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744).

    `num_layers=2, activation="gelu"` is its `mlp2x_gelu`: `W2 gelu(W1 x + b1) + b2`.

    Options:
        num_layers: number of affine maps.
        activation: between them, a name of transformers' activations.
        hidden_dim: width between them; null: the language model's.
        bias: whether the maps have a bias.
        input_norm: LayerNorm over the features, for encoders whose features are badly scaled.
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
        self.layers = mlp_layers(vision_dim, text_dim, num_layers, activation, hidden_dim, bias, input_norm)

    def forward(self, features: Tensor) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`."""
        return self.layers(features)


def connector_class(connector_type: str) -> type[Connector]:
    """Return the class of `model.connector.type`; a user's own class must have been added to the table.

    Raises:
        ValueError: there is no connector of this name.
    """
    if connector_type not in CONNECTORS:
        raise ValueError(
            f"model.connector.type={connector_type}: allowed are {', '.join(CONNECTORS)}, or package.module:Class "
            "for a class of your own. A checkpoint with such a class loads once you have named it in your own "
            "configuration, or with trust_remote_code=True."
        )
    return CONNECTORS[connector_type]


def connector_options(connector_type: str, options: Mapping[str, object]) -> dict[str, object]:
    """Return `options` without nulls, completed with the class's own defaults.

    Raises:
        ValueError: the class does not take an option, or an option has neither a value nor a default.
    """
    parameters = inspect.signature(connector_class(connector_type).__init__).parameters
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    defaults = {name: option.default for name, option in parameters.items() if option.kind is keyword_only}
    values = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in values if name not in defaults]:
        raise ValueError(
            f"model.connector.options.{unknown[0]}: {connector_type} does not take it; null leaves it out. "
            f"Allowed: {', '.join(defaults) or 'none'}"
        )
    complete = defaults | values
    for name, value in complete.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"model.connector.options.{name}: {connector_type} needs a value for it")
    return complete


def count_tokens(connector_type: str, num_features: int, options: Mapping[str, object]) -> int:
    """Return the number of tokens for an image of `num_features` features; without `num_tokens`, as many.

    Raises:
        ValueError: the options are invalid, or do not fit the number of features.
    """
    count = getattr(connector_class(connector_type), "num_tokens", None)
    return count(num_features, **options) if count else num_features


def keeps_grid(connector_type: str) -> bool:
    """Return whether a connector's tokens are in a grid as the features are; by default they are."""
    return getattr(connector_class(connector_type), "keeps_grid", True)


def square_side(connector_type: str, options: Mapping[str, object]) -> int | None:
    """Return the side of the square of patches that becomes one token at native resolution; None: it cannot read it."""
    side = getattr(connector_class(connector_type), "square_side", None)
    return None if side is None else side(**options)


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
"""`model.connector.type` -> its class; classes of the user's own are added by their names."""
