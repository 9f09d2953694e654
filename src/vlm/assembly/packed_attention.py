"""Attention within each sample of a packed row, for language models that use PyTorch's own (`sdpa`).

`flash_attention_2` finds the starts of samples itself; `flex_attention` and `eager` make block masks from the restarted
positions. With a mask, `sdpa` would compute all products of a row, most of them needlessly. So here each sample attends
on its own, on GPUs through PyTorch's flash kernels for samples of different lengths. Samples that share a prompt also
attend to its keys: these are copied before the keys of each sample, and attention is causal, aligned at the ends.
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

Sizes = tuple[Tensor, Tensor, int, int]
"""The starts of samples in queries and in keys, and the number of queries and keys of the longest sample."""


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None, key_index: Tensor | None = None, **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of one row whose samples begin at `cu_seq_lens_q`: `(1, heads, T, dim) -> (1, T, heads, dim)`.

    With `key_index`, the keys of samples are those at these places, and begin at `cu_seq_lens_k`.

    Raises:
        ValueError: the language model does not pass on the starts of samples, or needs an unsupported feature.
    """
    if key_index is None:
        cu_seq_lens_k, max_length_k = cu_seq_lens_q, max_length_q
    sizes = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
    if any(size is None for size in sizes) or attention_mask is not None:
        raise ValueError(
            f"trainer.packing=true: {type(module).__name__} does not tell its attention where samples start; choose "
            "model.attn_implementation=eager, or trainer.packing=false"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"trainer.packing=true: {type(module).__name__} has {name}, which only model.attn_implementation=eager "
                "and flash_attention_2 support"
            )
    sizes = cast(Sizes, sizes)
    _check_window(module, sliding_window, sizes[-1])
    if torch.is_autocast_enabled(query.device.type):  # rotations may have widened two of the three
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if key_index is not None:
        key, value = (states.index_select(2, key_index) for states in (key, value))
    if _supports_varlen_kernel(query) and not dropout:
        return _varlen_attention(query, key, value, sizes, scaling=scaling, window=sliding_window), None
    outputs = []
    lengths, key_lengths = (starts.diff().tolist() for starts in sizes[:2])
    samples = zip(
        query.split(lengths, dim=2), *(states.split(key_lengths, dim=2) for states in (key, value)), strict=True
    )
    for q, k, v in samples:  # out of a split, whose gradient is one concatenation
        mask = _sample_mask(q.shape[2], k.shape[2], sliding_window, query)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=True)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _check_window(module: nn.Module, window: int | None, max_length: int) -> None:
    """Check that no sample is longer than an attention window that only masks implement, as packed rows have no masks.

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
                f"trainer.packing=true: {type(module).__name__} attends to {window_length} tokens ({name}), which "
                f"only its masks limit, and a sample may have {max_length}; choose model.attn_implementation=eager, "
                "or lower dataset.max_length"
            )


def _supports_varlen_kernel(query: Tensor) -> bool:
    """Return whether PyTorch's kernels for samples of different lengths run: half precision, on GPUs from Ampere on."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sizes,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Return the same by one kernel for all samples."""
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 or newer

    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, dim)
    left = -1 if window is None else window - 1
    enable_gqa = q.shape[1] != k.shape[1]
    output = varlen_attn(q, k, v, *sizes, scale=scaling, window_size=(left, 0), enable_gqa=enable_gqa)
    assert isinstance(output, Tensor)
    return output[None]


def _sample_mask(length: int, num_keys: int, window: int | None, like: Tensor) -> Tensor | None:
    """Return a sample's mask `(1, 1, T, keys)`, of whose keys the last T are its own tokens'.

    None if tokens see all before them, in a sample that has no other keys: kernels compute that without a mask.
    """
    is_whole = window is None or num_keys <= window
    if is_whole and num_keys == length:
        return None
    positions = torch.arange(num_keys, device=like.device)
    distance = positions[num_keys - length :, None] - positions[None, :]
    return ((distance >= 0) & (distance < (num_keys if window is None else window)))[None, None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


@contextmanager
def use_packed_attention(config: PreTrainedConfig, *, shares_prompts: bool = False) -> Iterator[None]:
    """Make a language model with `sdpa` attend within samples, forward and backward, by changing its `config`.

    With `shares_prompts`, one that uses `flash_attention_2` does so too, which reads no `key_index`.
    """
    before = config._attn_implementation
    settable = cast(Any, config)
    if before == "sdpa" or (shares_prompts and before == "flash_attention_2"):
        settable._attn_implementation = {"": PACKED_ATTENTION}  # a mapping: configurations nested in it keep theirs
    try:
        yield
    finally:
        settable._attn_implementation = {"": before}
