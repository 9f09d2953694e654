"""Prediction heads: from hidden states of a language model to the outputs of a task.

Hub code: imports torch and its siblings only. To add a head, write a class whose `forward` takes features
`(..., D)` to `(..., K)` and whose keyword parameters are its options, and add it to `HEADS`.

Shapes: B rows, T tokens a row, D width of the language model, K outputs of a task (see `head_tasks.py`).
"""

import math
from collections.abc import Mapping
from inspect import signature
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_prediction import HeadSettings
from .contrastive import LogitScale, contrastive
from .head_tasks import EMBEDDING, NUM_OUTPUTS_BY_TASK
from .poolings import EVERY_TOKEN_POOLINGS, mean_over_mask


class LinearHead(nn.Module):
    """One linear layer: `(..., D) -> (..., K)`.

    Args:
        width: D.
        num_outputs: K.
        input_norm: whether features are normalised first, without weights of its own: hidden states of language
            models have a few very large entries.
        dropout: share of features left out in training.
    """

    def __init__(self, width: int, num_outputs: int, *, input_norm: bool = True, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False) if input_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        """`(..., D) -> (..., K)`."""
        return self.linear(self.dropout(self.norm(features)))


class MLPHead(nn.Module):
    """Linear layers with GELU between them: `(..., D) -> (..., K)`.

    Args:
        width: D.
        num_outputs: K.
        hidden_dim: width in between; None: D.
        num_layers: linear layers, at least 2.
        input_norm: see `LinearHead`.
        dropout: share of features left out before each linear layer in training.

    Raises:
        ValueError: there are fewer than 2 layers.
    """

    def __init__(
        self,
        width: int,
        num_outputs: int,
        *,
        hidden_dim: int | None = None,
        num_layers: int = 2,
        input_norm: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if num_layers < 2:
            raise ValueError(f"model.head.options.num_layers={num_layers}: at least 2 are needed; `linear` has one")
        self.norm = nn.LayerNorm(width, elementwise_affine=False) if input_norm else nn.Identity()
        widths = [width, *[hidden_dim or width] * (num_layers - 1), num_outputs]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Dropout(dropout), nn.Linear(before, after), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """`(..., D) -> (..., K)`."""
        return self.layers(self.norm(features))


class IdentityHead(nn.Module):
    """Hidden states as they are, for vectors that are compared: `(..., D) -> (..., D)`.

    Args:
        width: D.
        num_outputs: D.

    Raises:
        ValueError: they differ.
    """

    def __init__(self, width: int, num_outputs: int):
        super().__init__()
        if width != num_outputs:
            raise ValueError(
                f"model.head.type=identity has the width of hidden states, {width}, not {num_outputs}; a vector of "
                "another width (model.head.dim), or a score, needs model.head.type=linear"
            )

    def forward(self, features: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`."""
        return features


class OrdinalThresholds(nn.Module):
    """Cut points of an ordinal task: one score against C - 1 ascending thresholds: `(..., 1) -> (..., C - 1)`.

    McCullagh 1980, "Regression models for ordinal data": logit P(label > k) = score - cut_k.
    """

    def __init__(self, num_thresholds: int):
        super().__init__()
        self.first = nn.Parameter(torch.empty(1))
        self.steps = nn.Parameter(torch.empty(num_thresholds - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the cut points around 0, at distances of 1."""
        nn.init.constant_(self.first, -len(self.steps) / 2)
        nn.init.constant_(self.steps, math.log(math.e - 1))  # softplus gives 1

    def forward(self, score: Tensor) -> Tensor:
        """`(..., 1) -> (..., C - 1)`, in float32: in half precision, cut points far from 0 would coincide."""
        first, steps = self.first.float(), self.steps.float()
        return score.float() - torch.cat([first, first + F.softplus(steps).cumsum(0)])


class PredictionHead(nn.Module):
    """A pooling followed by a head.

    Args:
        width: D.
        settings: its task, labels, pooling, class and options, and the shift and scale of `regression`.
    """

    def __init__(self, width: int, settings: HeadSettings):
        super().__init__()
        self.settings = settings
        num_labels = len(settings.labels)
        is_ordinal, embeds = settings.task == "ordinal", settings.task == EMBEDDING
        if embeds:
            self.num_outputs = settings.dim or width
        else:
            self.num_outputs = 1 if is_ordinal else NUM_OUTPUTS_BY_TASK[settings.task](num_labels)
        self.layers = head_class(settings.type)(width, self.num_outputs, **settings.options)
        self.cuts = OrdinalThresholds(num_labels - 1) if is_ordinal else None
        # without a bias, which a softmax would not see
        self.attention = nn.Linear(width, 1, bias=False) if settings.pooling == "attention" else None
        self.temperature = make_logit_scale(settings.loss_options) if embeds else None

    def loss_options(self) -> dict[str, object]:
        """Return the keyword parameters of the loss, with the temperature as it is now."""
        options = dict(self.settings.loss_options)
        return options if self.temperature is None else {**options, "temperature": self.temperature()}

    def forward(self, features: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """Return the outputs of the task, in float32.

        Args:
            features: hidden states after `pool_hidden_states`: `(B, D)`, or `(B, T, D)` where every token is needed.
            prompt_mask: `(B, T)`, boolean: tokens of the prompt; needed where every token is.

        Returns:
            `(B, K)`; for `regression` in units of the labels, for `embedding` of length 1.

        Raises:
            ValueError: `prompt_mask` is missing, or a user's own class returns another number of outputs.
        """
        task, pooling = self.settings.task, self.settings.pooling
        if pooling not in EVERY_TOKEN_POOLINGS:
            prompt_mask = None
        elif prompt_mask is None:
            raise ValueError(f"pooling={pooling} reads every token: give attention_mask with features")
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(next(self.layers.parameters(), features).dtype)
            if prompt_mask is not None:
                features = features.masked_fill(~prompt_mask.unsqueeze(-1), 0)  # padding may hold anything, even NaN
                if self.attention is not None:
                    normal = F.layer_norm(features, features.shape[-1:])  # otherwise one token would get all the weight
                    scores = self.attention(normal).squeeze(-1).float().masked_fill(~prompt_mask, -torch.inf)
                    features = (scores.softmax(dim=1).to(features.dtype).unsqueeze(1) @ features).squeeze(1)
            outputs = self.layers(features)
            if outputs.shape[-1] != self.num_outputs:
                raise ValueError(
                    f"model.head.type={self.settings.type} gives {outputs.shape[-1]} numbers; its second argument "
                    f"asked for {self.num_outputs}"
                )
            if self.cuts is not None:
                outputs = self.cuts(outputs)
            outputs = outputs.float()
            if prompt_mask is not None and pooling == "alltoken":
                outputs = average_token_outputs(task, outputs, prompt_mask)
        if task == EMBEDDING:
            return F.normalize(outputs, dim=-1)
        return outputs * self.settings.scale + self.settings.shift if task == "regression" else outputs


def make_logit_scale(options: Mapping[str, object]) -> LogitScale:
    """Return the temperature that the options of `contrastive` ask for."""
    default = signature(contrastive).parameters["temperature"].default
    return LogitScale(float(options.get("temperature", default)), learned=bool(options.get("learned_temperature")))  # pyright: ignore[reportArgumentType] - a number, as the checks hold it


def average_token_outputs(task: str, outputs: Tensor, prompt_mask: Tensor) -> Tensor:
    """Return the logits of the mean of probabilities over tokens: `(B, T, K), (B, T) -> (B, K)`.

    Outputs of `regression`, `pairwise` and `embedding` are averaged themselves.
    """
    if task in ("regression", "pairwise", EMBEDDING):
        return mean_over_mask(outputs, prompt_mask)
    absent = ~prompt_mask.unsqueeze(-1)
    if task == "multiclass":
        return outputs.log_softmax(dim=2).masked_fill(absent, -torch.inf).logsumexp(dim=1)
    yes, no = (F.logsigmoid(x).masked_fill(absent, -torch.inf).logsumexp(dim=1) for x in (outputs, -outputs))
    return yes - no


HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "mlp": MLPHead, "identity": IdentityHead}


def head_class(name: str) -> type[nn.Module]:
    """Return the class of a head; a user's own class must have been added to the table.

    Raises:
        ValueError: there is no head of this name.
    """
    if name not in HEADS:
        raise ValueError(
            f"model.head.type={name}: allowed are {', '.join(HEADS)}, or package.module:Class for a class of your own. "
            "A checkpoint with such a class loads once you have named it in your own configuration, or with "
            "trust_remote_code=True."
        )
    return HEADS[name]
