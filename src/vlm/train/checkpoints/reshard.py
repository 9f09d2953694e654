"""Resumes in another world: trained parameters are read one by one, and put into the model as it is sharded now.

A checkpoint has one of three layouts: that of a run without sharding, DeepSpeed's shards, and PyTorch's distributed
checkpoint under FSDP2. Weights, optimiser states and the schedule are carried over. The states of random numbers belong
to ranks; if the number of ranks changes, they start from the seed.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.optim import Optimizer

from vlm.train.checkpoints.by_name import SavedParameter, SavedParameters, set_states
from vlm.train.checkpoints.deepspeed_shards import open_deepspeed
from vlm.train.checkpoints.sharded import FOLDER, open_sharded
from vlm.train.checkpoints.trained import TRAINED_WEIGHTS
from vlm.train.sharding import shard_like


def open_parameters(checkpoint: Path, names: Sequence[str], trained: Collection[str]) -> SavedParameters:
    """Return the saved state of each trained parameter of a checkpoint of any world.

    Args:
        checkpoint: the folder of the checkpoint.
        names: full names of the optimiser's parameters in its order, because some checkpoints number them.
        trained: full names of what trains in this run.
    """
    if (checkpoint / FOLDER).is_dir():
        return open_sharded(checkpoint)
    if (checkpoint / TRAINED_WEIGHTS).is_file():
        return _open_plain(checkpoint, names)
    return open_deepspeed(checkpoint, names, trained)


def _open_plain(checkpoint: Path, names: Sequence[str]) -> SavedParameters:
    states = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)["state"]
    numbers = {name: number for number, name in enumerate(names)}

    def read(name: str) -> SavedParameter:
        """Read a parameter with the optimiser's state of it."""
        with safe_open(checkpoint / TRAINED_WEIGHTS, "pt") as weights:
            return SavedParameter(weights.get_tensor(name), states.get(numbers.get(name), {}))

    with safe_open(checkpoint / TRAINED_WEIGHTS, "pt") as weights:
        return SavedParameters(dict.fromkeys(weights.keys()), read)


@torch.no_grad()
def put_parameters(tensors: Mapping[str, Tensor], optimizer: Optimizer, saved: Mapping[str, SavedParameter]) -> None:
    """Load trained parameters into a model that DeepSpeed does not shard, and their states into its optimiser."""
    states = {}
    for name, tensor in tensors.items():
        item = saved[name]
        tensor.copy_(shard_like(tensor, item.weight))
        states[tensor] = {
            key: shard_like(tensor, value) if value.shape == item.weight.shape else value
            for key, value in item.states.items()
        }
    set_states(optimizer, states)
