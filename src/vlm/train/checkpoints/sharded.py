"""Checkpoints of a model that FSDP2 shards: each rank writes its slices, and any number of ranks reads them.

PyTorch's distributed checkpoint is in the folder `distributed`: `weight:<name>` of what trains, and
`state:<name>:<key>` of the optimiser. Names of parameters hold no colon.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from vlm.train.checkpoints.by_name import SavedParameter, SavedParameters, set_states

FOLDER = "distributed"


def save_sharded(checkpoint: Path, tensors: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Write trained parameters and their optimiser states; every rank calls this.

    Args:
        checkpoint: the folder of the checkpoint.
        tensors: full name -> parameter or buffer that trains.
        optimizer: the optimiser of the parameters.

    Raises:
        ValueError: the optimiser keeps something that cannot be sharded as its parameter is.
    """
    dcp.save(_make_state(tensors, optimizer), checkpoint_id=checkpoint / FOLDER)


def save_sharded_in_background(
    checkpoint: Path, tensors: Mapping[str, Tensor], optimizer: Optimizer, group: dist.ProcessGroup | None
) -> Callable[[], object]:
    """Copy what `save_sharded` writes into host memory, and write it while the run continues.

    Args:
        checkpoint: as `save_sharded`, with `tensors` and `optimizer`.
        tensors: see there.
        optimizer: see there.
        group: a process group of all ranks on the CPU that nothing else uses meanwhile; None for a single rank.

    Returns:
        A function that waits until this rank has written its files, and raises what went wrong.
    """
    state = _make_state(tensors, optimizer)
    future = dcp.async_save(state, checkpoint_id=checkpoint / FOLDER, process_group=group)
    assert isinstance(future, Future)
    return future.result


def own_files(rank: int) -> str:
    """Return the pattern of the files that a rank writes, within the checkpoint's folder."""
    return f"{FOLDER}/__{rank}_*"


def _make_state(tensors: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {f"weight:{name}": tensor.detach() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for key, value in optimizer.state.get(tensor, {}).items():
            if not isinstance(value, Tensor):
                value = torch.tensor(value)
            if value.numel() > 1 and value.shape != tensor.shape:
                raise ValueError(
                    f"trainer.optim: the state {key} of {name} has the shape {tuple(value.shape)}, and the weight "
                    f"{tuple(tensor.shape)}. With trainer.sharding=fsdp2, a state must have the shape of its weight"
                )
            state[f"state:{name}:{key}"] = value
    return state


def load_sharded(checkpoint: Path, tensors: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Load what `save_sharded` wrote, on any number of ranks, into the trained parameters; same arguments."""
    saved = _read_metadata(checkpoint)
    state: dict[str, Any] = {f"weight:{name}": tensor.detach() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for key in _state_keys(saved, name):
            entry = saved[f"state:{name}:{key}"]
            if entry.size == tensor.shape:
                value = torch.zeros_like(tensor.detach(), dtype=entry.properties.dtype)  # sharded as its parameter is
            else:
                value = torch.zeros(entry.size, dtype=entry.properties.dtype)
            state[f"state:{name}:{key}"] = value
    dcp.load(state, checkpoint_id=checkpoint / FOLDER)
    states = {
        tensor: {key: state[f"state:{name}:{key}"] for key in _state_keys(saved, name)}
        for name, tensor in tensors.items()
    }
    set_states(optimizer, states)


def open_sharded(checkpoint: Path) -> SavedParameters:
    """Return the saved state of each parameter of such a checkpoint, for a run without FSDP2."""
    saved = _read_metadata(checkpoint)

    def read(name: str) -> SavedParameter:
        """Read a whole parameter with the optimiser's state of it."""
        keys = {f"weight:{name}", *(f"state:{name}:{key}" for key in _state_keys(saved, name))}
        whole = {key: torch.empty(saved[key].size, dtype=saved[key].properties.dtype) for key in keys}
        dcp.load(whole, checkpoint_id=checkpoint / FOLDER, no_dist=True)
        weight = whole.pop(f"weight:{name}")
        return SavedParameter(weight, {key.rpartition(":")[2]: value for key, value in whole.items()})

    names = {key.partition(":")[2] for key in saved if key.startswith("weight:")}
    return SavedParameters(dict.fromkeys(names), read)


def saved_names(checkpoint: Path) -> set[str]:
    """Return the full names of the trained parameters of a checkpoint."""
    return set(open_sharded(checkpoint))


def _read_metadata(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    if not (checkpoint / FOLDER).is_dir():
        raise ValueError(
            f"{checkpoint}: it has no folder {FOLDER}, so it was not written with trainer.sharding=fsdp2; "
            "resume with its own trainer.deepspeed or trainer.sharding"
        )
    return dcp.FileSystemReader(checkpoint / FOLDER).read_metadata().state_dict_metadata  # pyright: ignore[reportReturnType]


def _state_keys(saved: Mapping[str, object], name: str) -> list[str]:
    prefix = f"state:{name}:"
    return [key.removeprefix(prefix) for key in saved if key.startswith(prefix)]
