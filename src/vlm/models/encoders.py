"""Visual encoders: reading selected hidden states and tokens, of one encoder or of several.

Hub code: imports torch and transformers only.

Shapes: I images, P features an image, V width of the features.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

EARLY_EXIT_TYPES = (
    "clip_vision_model",
    "siglip_vision_model",
    "siglip2_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "vit",
    "deit",
    "ijepa",
)
"""Model types whose `hidden_states[k]` is the output of their first `k` layers, so that later layers need not run.

timm's models stop through timm's own code; any other encoder runs to its end.
"""


class EncoderEnsemble(nn.Module):
    """Several visual encoders that see the same images; their features are concatenated by channel.

    As DINOv2 and SigLIP in prismatic (Karamcheti et al. 2024, arXiv:2402.07865, section 4.2). A model with one encoder
    holds it directly.
    """

    def __init__(self, encoders: Sequence[PreTrainedModel]):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self._no_split_modules = {name for encoder in encoders for name in encoder._no_split_modules or ()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of pixels that the encoders take."""
        return next(encoder.dtype for encoder in self.encoders if isinstance(encoder, PreTrainedModel))


def combine_encoders(encoders: Sequence[PreTrainedModel]) -> PreTrainedModel | EncoderEnsemble:
    """Return a single encoder unchanged, several as an `EncoderEnsemble`."""
    return encoders[0] if len(encoders) == 1 else EncoderEnsemble(encoders)


def read_features(
    encoder: nn.Module,
    pixel_values: Tensor,
    feature_layer: int | list[int] | None,
    feature_strategy: str,
    num_prefix_tokens: int,
) -> Tensor:
    """Read the selected tokens of the selected hidden states of an encoder: `(I, 3, height, width) -> (I, P, V)`.

    Only the selected hidden states are kept; several are concatenated by channel in the order of `feature_layer`. Later
    layers are not run, see `EARLY_EXIT_TYPES`. The last three arguments are fields of `VLMConfig`.
    """
    features = read_states(encoder, {"pixel_values": pixel_values}, feature_layer)
    match feature_strategy:
        case "patch":
            return features[:, num_prefix_tokens:]
        case "cls":
            return features[:, :1]
        case "cls+patch":
            return torch.cat([features[:, :1], features[:, num_prefix_tokens:]], dim=1)
        case _:
            return features


def read_states(
    encoder: nn.Module, inputs: Mapping[str, Tensor | bool | None], feature_layer: int | list[int] | None
) -> Tensor:
    """Return the selected hidden states of an encoder, concatenated by channel: `(I, tokens, V)`.

    Args:
        encoder: the encoder.
        inputs: the arguments of its `forward`, `pixel_values` among them.
        feature_layer: see `VLMConfig`.
    """
    if feature_layer is None:
        return flatten_feature_map(encoder(**inputs, return_dict=True).last_hidden_state)
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    requested_layers = sorted(set(layers))
    states = _hidden_states(encoder, inputs, requested_layers)
    requested = [state for state in states if state is not None]
    if len(requested) == len(requested_layers):  # otherwise the encoder returned all hidden states in any case
        states = dict(zip(requested_layers, requested, strict=True))
    return torch.cat([flatten_feature_map(states[layer]) for layer in layers], dim=2)


def _hidden_states(encoder: Any, inputs: Mapping[str, Any], requested_layers: list[int]) -> Sequence[Tensor]:
    """Return the requested hidden states, or those of all layers, of which others may be None."""
    if hasattr(encoder, "timm_model") and not encoder.features_only:
        pixels = inputs["pixel_values"].to(encoder.device, encoder.dtype)  # the wrapper would run all layers
        read = encoder.timm_model.forward_intermediates
        return read(pixels, indices=requested_layers, stop_early=True, intermediates_only=True)
    with _truncated_layers(encoder, max(*requested_layers, 1)):
        return encoder(**inputs, output_hidden_states=requested_layers, return_dict=True).hidden_states


class _TruncatedLayers(nn.ModuleList):
    """All layers under their names; a loop runs over the first `num_layers`, and none is removed from the model."""

    def __init__(self, layers: nn.ModuleList, num_layers: int):
        super().__init__()
        self._modules = layers._modules
        self.num_layers = num_layers
        self.all_layers = (layers,)  # in a tuple, it is no submodule

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(super().__iter__(), self.num_layers)


@contextmanager
def _truncated_layers(encoder: PreTrainedModel, num_layers: int) -> Iterator[None]:
    """Within this context, an encoder of `EARLY_EXIT_TYPES` runs only its first layers."""
    location = _find_layer_list(encoder) if encoder.config.model_type in EARLY_EXIT_TYPES else None
    if location is None or num_layers >= encoder.config.num_hidden_layers or torch.compiler.is_compiling():
        yield
        return
    owner, name = location
    layers = getattr(owner, name)
    all_layers = layers.all_layers[0] if isinstance(layers, _TruncatedLayers) else layers  # of another thread
    setattr(owner, name, _TruncatedLayers(all_layers, num_layers))
    try:
        yield
    finally:
        setattr(owner, name, all_layers)


def _find_layer_list(encoder: PreTrainedModel) -> tuple[nn.Module, str] | None:
    """Return the module that holds an encoder's layers, and their name; None where it has several such lists."""
    locations = [
        (owner, name)
        for owner in encoder.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == encoder.config.num_hidden_layers
    ]
    return locations[0] if len(locations) == 1 else None


def flatten_feature_map(state: Tensor) -> Tensor:
    """Return a hidden state as tokens; a feature map row by row: `(I, V, rows, columns) -> (I, rows * columns, V)`."""
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state
