"""Refuses to save weights that are not finite; every rank checks what it holds."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlm.train.distributed import all_gather_objects


def find_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of tensors with a NaN or infinite value on any rank; every rank must call this.

    For sharded parameters, each rank checks its own shard. This waits for the device once.
    """
    named = [(name, held) for name, tensor in tensors if (held := held_here(tensor)).is_floating_point()]
    device = named[0][1].device if named else None  # offloaded parameters are on another one than buffers
    finite = [held.isfinite().all().to(device) for _, held in named]
    are_finite = torch.stack(finite).tolist() if finite else []
    names = [name for (name, _), is_finite in zip(named, are_finite, strict=True) if not is_finite]
    if not dist.is_initialized():
        return names
    return sorted({name for found in all_gather_objects(names) for name in found})


def held_here(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: the whole, or its shard under ZeRO-3 or FSDP2."""
    shard = getattr(tensor, "ds_tensor", None)  # of DeepSpeed's ZeRO-3
    if shard is not None:
        return shard.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def describe_nonfinite(names: list[str], what: str) -> str:
    """Return the message for weights that are not saved; `what` names the checkpoint or model to be saved."""
    others = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return (
        f"{what} is not written: weights are NaN or infinite ({', '.join(names[:3])}{others}). The gradients were "
        "finite, so an update did this. Lower the learning rate, and resume from an earlier checkpoint."
    )
