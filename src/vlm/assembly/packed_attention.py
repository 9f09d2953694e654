"""Attention within each sample of a packed row, for language models that use PyTorch's own (`sdpa`).

`flash_attention_2` reads where samples begin by itself; `flex_attention` and `eager` make block masks of the restarted
positions. A mask would have `sdpa` compute all of a row's products, most of them for nothing: here each sample is
attended to alone, on GPUs through PyTorch's flash kernels for samples of different lengths.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED_ATTENTION = "vlm_packed"
"""The name that it is registered under; transformers makes masks for its own names only."""


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of one row whose samples begin at `cu_seq_lens_q`: `(1, heads, T, dim) -> (1, T, heads, dim)`.

    Raises:
        ValueError: the language model does not pass on where samples begin, or needs more than this computes.
    """
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        raise ValueError(
            f"trainer.packing=true: {type(module).__name__} does not tell its attention where samples begin; choose "
            "model.attn_implementation=eager, or trainer.packing=false"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"trainer.packing=true: {type(module).__name__} has {name}, which only model.attn_implementation=eager "
                "or flash_attention_2 compute"
            )
    _check_window(module, sliding_window, max_length_q)
    if torch.is_autocast_enabled(query.device.type):  # rotations may have widened two of the three
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if _supports_varlen_kernel(query) and not dropout:
        starts = cu_seq_lens_q
        output = _varlen_attention(query, key, value, starts, max_length_q, scaling=scaling, window=sliding_window)
        return output, None
    outputs = []
    lengths = cu_seq_lens_q.diff().tolist()
    samples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    for q, k, v in samples:  # out of a split, whose gradient is one concatenation
        mask = _sliding_window_mask(q.shape[2], sliding_window, query)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=True)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _check_window(module: nn.Module, window: int | None, max_length: int) -> None:
    """Check that no sample is longer than a window that only masks know of, since packed rows have no masks.

    Raises:
        ValueError: a sample is longer.
    """
    config = getattr(module, "config", None)
    layer = getattr(module, "layer_idx", None)
    layer_types = getattr(config, "layer_types", None)
    if window is not None or config is None or getattr(config, "use_sliding_window", None) is False:
        return
    if layer_types is not None and layer is not None and layer_types[layer] == "full_attention":
        return
    for name in ("sliding_window", "attention_chunk_size"):
        window_length = getattr(config, name, None)
        if isinstance(window_length, int) and window_length < max_length:
            raise ValueError(
                f"trainer.packing=true: {type(module).__name__} sees {window_length} tokens ({name}), which only its "
                f"masks say, and a sample has {max_length}; choose model.attn_implementation=eager, or lower "
                "dataset.max_length"
            )


def _supports_varlen_kernel(query: Tensor) -> bool:
    """Return whether PyTorch's kernels for samples of different lengths run: half precision, on GPUs from Ampere on."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, max_length: int, *, scaling: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Return the same by one kernel for all samples."""
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 or newer

    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, dim)
    sizes = starts, starts, max_length, max_length
    left = -1 if window is None else window - 1
    enable_gqa = q.shape[1] != k.shape[1]
    output = varlen_attn(q, k, v, *sizes, scale=scaling, window_size=(left, 0), enable_gqa=enable_gqa)
    assert isinstance(output, Tensor)
    return output[None]


def _sliding_window_mask(length: int, window: int | None, like: Tensor) -> Tensor | None:
    """Return a sample's mask `(1, 1, T, T)` where tokens see no further back than a window; None: they see all."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=like.device)
    distance = positions[:, None] - positions[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


@contextmanager
def use_packed_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Let a language model that uses `sdpa` attend within samples, forward and backward: its layers read `config`."""
    before = config._attn_implementation
    settable = cast(Any, config)
    if before == "sdpa":
        settable._attn_implementation = {"": PACKED_ATTENTION}  # a mapping: configurations nested in it keep theirs
    try:
        yield
    finally:
        settable._attn_implementation = {"": before}
