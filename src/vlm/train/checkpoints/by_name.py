"""Trained parameters by name: the form in which a checkpoint of one world is read into another."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class SavedParameter:
    """A parameter or buffer that trains, whole and on the CPU.

    Attributes:
        weight: its values, in the precision that the optimiser has them in.
        states: key -> the optimiser's state: tensors of the weight's shape, such as `exp_avg`, and scalars (`step`).
    """

    weight: Tensor
    states: Mapping[str, Tensor]


class SavedParameters(Mapping[str, SavedParameter]):
    """Full name -> the saved parameter of a checkpoint, read on access.

    A state raises ValueError if it is neither a scalar nor has the shape of the weight, like the states of 8-bit Adam.

    Args:
        names: the names.
        read: reads one.
    """

    def __init__(self, names: Mapping[str, object], read: Callable[[str], SavedParameter]):
        self.names, self.read = names, read

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> SavedParameter:
        if name not in self.names:
            raise KeyError(name)
        saved = self.read(name)
        for key, value in saved.states.items():
            if value.ndim and (value.shape != saved.weight.shape or not value.is_floating_point()):
                raise ValueError(
                    f"trainer.optim: its state {key} of {name} is {tuple(value.shape)} {value.dtype}, which cannot be "
                    "sharded like the weight. Resume with the number of ranks and the sharding that wrote the "
                    "checkpoint"
                )
        return saved

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def set_states(optimizer: Optimizer, states: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Give an optimiser the states of its parameters; those that it already has are dropped."""
    content = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    content["state"] = {
        number: {key: value.clone() for key, value in states[parameter].items()}  # optimisers count steps in place
        for number, parameter in enumerate(parameters)
        if states.get(parameter)
    }
    optimizer.load_state_dict(content)
