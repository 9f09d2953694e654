"""Joining the caches of rows that were filled apart, and parting them again.

Rows of a batch are padded on the left. A layer of full attention holds keys and values `(rows, heads, tokens, width)`
of all tokens, one with a window those of the last `window - 1`; states of linear attention have no tokens.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

JOINABLE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    DummyLayer,
)
"""Kinds of layers that can be joined; a class derived from one of them may hold more than it does."""


class FilledLayer(Protocol):
    """A layer that holds keys and values `(rows, heads, tokens, width)`."""

    keys: Tensor
    values: Tensor


def is_filled(cache: Cache) -> bool:
    """Return whether a cache holds all of what a prompt left: some models keep a part of it in their modules."""
    layers = cast(list[object], getattr(cache, "layers", []))
    if not layers:
        return not isinstance(cache, DynamicCache)
    linear = [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]
    return all(map(_has_states, linear)) and any(_has_states(layer) or _has_keys(layer) for layer in layers)


def is_joinable(cache: Cache, length: int) -> bool:
    """Return whether a cache of rows of so many tokens can be joined with others."""
    return type(cache) is DynamicCache and all(
        type(layer) in JOINABLE_LAYERS and (not _has_keys(layer) or layer.keys.shape[-2] == _num_kept(layer, length))
        for layer in cache.layers
    )


def join_caches(caches: Sequence[Cache], lengths: Sequence[int]) -> DynamicCache:
    """Return one cache of the rows of several, padded on the left to the greatest length.

    Args:
        caches: joinable caches of one model; they are not changed.
        lengths: the number of tokens that each has seen.
    """
    joined = copy(cast(DynamicCache, caches[0]))
    joined.layers = [
        _join_layers(layers, max(lengths)) for layers in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return joined


def cut_cache(cache: Cache, length: int) -> None:
    """Keep the last so many tokens of a cache: its first ones are padding in every row."""
    for layer in cast(list[Any], cache.layers):
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
        if _has_keys(layer):
            kept = _num_kept(layer, length)
            layer.keys = layer.keys[..., layer.keys.shape[-2] - kept :, :]
            layer.values = layer.values[..., layer.values.shape[-2] - kept :, :]


def _join_layers(layers: Sequence[Any], length: int) -> Any:
    first = layers[0]
    joined = copy(first)
    if _has_keys(first):
        for name in ("keys", "values"):
            padded = [_pad_left(getattr(layer, name), _num_kept(layer, length)) for layer in layers]
            setattr(joined, name, torch.cat(padded))
    if hasattr(first, "cumulative_length"):
        joined.cumulative_length = length
    if isinstance(first, LinearAttentionLayer):
        for name in ("conv_states", "recurrent_states"):
            states = [getattr(layer, name) for layer in layers]
            joined_states = {
                key: None if value is None else torch.cat([state[key] for state in states])
                for key, value in states[0].items()
            }
            setattr(joined, name, joined_states)
    return joined


def _has_keys(layer: object) -> TypeGuard[FilledLayer]:
    return isinstance(layer, DynamicLayer) and layer.is_initialized


def _has_states(layer: object) -> bool:
    kinds = ("is_recurrent_states_initialized", "is_conv_states_initialized")
    return any(any(getattr(layer, kind, {}).values()) for kind in kinds)


def _num_kept(layer: object, length: int) -> int:
    """Return how many tokens' keys a layer holds after so many tokens."""
    return min(length, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else length


def _pad_left(states: Tensor, length: int) -> Tensor:
    """Pad keys or values `(rows, heads, tokens, width)` to so many tokens."""
    return F.pad(states, (0, 0, length - states.shape[-2], 0))
