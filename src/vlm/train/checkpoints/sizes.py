"""Estimates the bytes of a checkpoint: those of the previous one, or of the tensors that go into it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.train.checkpoints.find import list_checkpoints
from vlm.train.checkpoints.groups import rank_and_world_size
from vlm.train.checkpoints.manifest import read_manifest

OTHER_BYTES = 1 << 16
"""Bytes that a rank writes besides tensors: states of random numbers and of the run, settings."""


def previous_checkpoint_bytes(run_directory: Path) -> int | None:
    """Return the size of a run's newest checkpoint; None if there is none by as many ranks."""
    for checkpoint in list_checkpoints(run_directory).values():
        try:
            manifest = read_manifest(checkpoint)
        except ValueError:
            continue
        return manifest.num_bytes if manifest.world_size == rank_and_world_size()[1] else None
    return None


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(num_elements(tensor) * tensor.element_size() for tensor in tensors)


def num_elements(tensor: Tensor) -> int:
    """Return the number of elements of a tensor; for one that ZeRO-3 shards, those of the whole tensor."""
    return getattr(tensor, "ds_numel", tensor.numel())


def optimizer_bytes(optimizer: Any) -> int:
    """Return the bytes of this rank's states of an optimiser, within whatever wraps it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = _tensors_in(optimizer.state)
    return tensor_bytes(state.to_local() if isinstance(state, DTensor) else state for state in states)


def new_checkpoint_bytes(
    trained: Collection[Tensor], optimizer: Any, *, leads: bool, is_sharded: bool, copies_weights: bool
) -> int:
    """Return about how many bytes a rank writes into a run's first checkpoint.

    Args:
        trained: the weights that train.
        optimizer: the run's optimiser.
        leads: whether this rank writes what exists once: weights, and states that are not sharded.
        is_sharded: whether the states are sharded over all ranks.
        copies_weights: whether the states include float32 weights, as under DeepSpeed.
    """
    num_bytes = OTHER_BYTES + (tensor_bytes(trained) if leads else 0)
    if copies_weights:
        num_bytes += 4 * sum(map(num_elements, trained)) // rank_and_world_size()[1]
    return num_bytes + (optimizer_bytes(optimizer) if leads or is_sharded else 0)


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a whole model."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
