"""Connectors whose learned queries read the features by attention: as many tokens as queries, whatever the encoder.

Hub code: imports torch, transformers and its siblings only. They take features of any number and arrangement.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.activations import ACT2FN

from .connector_parts import Connector, require_activation, require_heads, require_positive
from .native import Grid


class QueryConnector(Connector):
    """A connector with learned queries: as many tokens as queries, in no grid."""

    keeps_grid = False

    @classmethod
    def num_tokens(cls, num_features: int, *, num_queries: int, **options: object) -> int:
        """Return the number of queries; raise ValueError where it is no whole number of at least 1."""
        require_positive(num_queries=num_queries)
        return num_queries

    @classmethod
    def square_side(cls, **options: object) -> int | None:
        """Return 1: queries read grids of any rows and columns, of which none are merged."""
        return 1

    def map_native(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Map the features of images of different sizes, padded to the largest, see `Connector`."""
        lengths = torch.tensor([rows * columns for rows, columns in grids], device=features.device)
        padded = pad_sequence(list(features.split(lengths.tolist())), batch_first=True)  # (images, most, vision_dim)
        mask = torch.arange(padded.shape[1], device=features.device) < lengths[:, None]
        return self(padded, mask).flatten(0, 1)


class ResamplerConnector(QueryConnector):
    """Flamingo's perceiver resampler (Alayrac et al. 2022, arXiv:2204.14198), then a linear map.

    In each layer the queries attend to the features and to themselves, then go through a feed-forward network four
    times as wide; both are residual, with norms before them and no biases. The order of the features makes no
    difference: positions are known only from what the encoder has put into the features. The default has the paper's
    numbers of queries, layers and heads, but heads of width `hidden_dim / num_heads`, and no time embeddings.

    Options:
        num_queries: tokens of an image.
        num_layers: layers.
        hidden_dim: their width; null: the visual encoder's. Features of another width are mapped to it first.
        num_heads: attention heads; divides `hidden_dim`.
        activation: of the feed-forward networks; `relu2` is the paper's squared ReLU.
        input_norm: LayerNorm over the features, ahead of that of every layer and of the map to `hidden_dim`.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        num_queries: int = 64,
        num_layers: int = 6,
        hidden_dim: int | None = None,
        num_heads: int = 16,
        activation: str = "relu2",
        input_norm: bool = False,
    ):
        super().__init__()
        hidden_dim = vision_dim if hidden_dim is None else hidden_dim
        require_positive(num_queries=num_queries, num_layers=num_layers)
        require_heads(num_heads, hidden_dim)
        require_activation(activation)
        self.input_norm = nn.LayerNorm(vision_dim) if input_norm else nn.Identity()
        self.input = nn.Identity() if hidden_dim == vision_dim else nn.Linear(vision_dim, hidden_dim)
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_dim))
        self.blocks = nn.ModuleList([PerceiverBlock(hidden_dim, num_heads, activation) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, text_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the queries with unit variance, as OpenFlamingo does; modules initialise themselves."""
        nn.init.normal_(self.queries)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`.

        `mask` `(images, features)` is false at padding.
        """
        features = self.input(self.input_norm(features))
        queries = self.queries.expand(features.shape[0], -1, -1)  # (images, queries, hidden_dim)
        for block in self.blocks:
            queries = block(queries, features, mask)
        return self.output(self.norm(queries))


class PerceiverBlock(nn.Module):
    """Attention of queries to features and queries, and a feed-forward network (figure 5 of the paper).

    `(images, queries, width), (images, features, width) -> (images, queries, width)`.
    """

    def __init__(self, width: int, num_heads: int, activation: str):
        super().__init__()
        self.num_heads = num_heads
        self.feature_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            ACT2FN[activation],
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, queries: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update the queries, see the class; `mask` `(images, features)` is false at features that are padding."""
        if mask is not None:
            mask = F.pad(mask, (0, queries.shape[1]), value=True)[:, None, None]  # (images, 1, 1, features + queries)
        normed = self.query_norm(queries)
        keys = torch.cat([self.feature_norm(features), normed], dim=1)  # (images, features + queries, width)
        attended = F.scaled_dot_product_attention(
            self._heads(self.query(normed)), self._heads(self.key(keys)), self._heads(self.value(keys)), mask
        )
        queries = queries + self.output(attended.transpose(1, 2).flatten(2))
        return queries + self.feed_forward(queries)

    def _heads(self, tokens: Tensor) -> Tensor:
        """`(images, tokens, width) -> (images, heads, tokens, width / heads)`."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class QFormerConnector(QueryConnector):
    """BLIP-2's querying transformer (Li et al. 2023, arXiv:2301.12597), then a linear map.

    A BERT whose tokens are learned queries and whose every `cross_attention_frequency`-th layer reads the features. It
    is transformers' own `Blip2QFormerModel` without text: without word embeddings and feed-forward networks for text.
    The default has the paper's size. Its weights are initialised at random, not from BERT.

    Options:
        num_queries: tokens of an image.
        num_layers: layers.
        hidden_dim: their width; the feed-forward networks are four times as wide.
        num_heads: attention heads; divides `hidden_dim`.
        cross_attention_frequency: the first of every so many layers reads the features.
        dropout: of attention and of every layer's output, while training.
        input_norm: LayerNorm over the features, which BLIP-2 puts behind its encoder.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        *,
        num_queries: int = 32,
        num_layers: int = 12,
        hidden_dim: int = 768,
        num_heads: int = 12,
        cross_attention_frequency: int = 2,
        dropout: float = 0.1,
        input_norm: bool = True,
    ):
        super().__init__()
        require_positive(
            num_queries=num_queries, num_layers=num_layers, cross_attention_frequency=cross_attention_frequency
        )
        require_heads(num_heads, hidden_dim)
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"model.connector.options.dropout={dropout}: at least 0 and less than 1 is needed")
        self.input_norm = nn.LayerNorm(vision_dim) if input_norm else nn.Identity()
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_dim))
        config = Blip2QFormerConfig(
            hidden_size=hidden_dim,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * hidden_dim,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=vision_dim,
        )
        self.qformer = Blip2QFormerModel(config)
        self.output = nn.Linear(hidden_dim, text_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the queries as BERT's and BLIP-2's embeddings; modules initialise themselves."""
        nn.init.normal_(self.queries, std=self.qformer.config.initializer_range)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map features: `(images, features, vision_dim) -> (images, tokens, text_dim)`.

        `mask` `(images, features)` is false at padding.
        """
        queries = self.queries.expand(features.shape[0], -1, -1)  # (images, queries, hidden_dim)
        features = self.input_norm(features)
        outputs = self.qformer(
            query_embeds=queries,
            encoder_hidden_states=features,
            encoder_attention_mask=None if mask is None else mask.int(),
        )
        return self.output(outputs.last_hidden_state)
