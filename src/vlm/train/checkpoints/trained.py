"""The tensors that training changes, which a checkpoint holds."""

from torch import Tensor

from vlm.assembly.model_interface import TrainableModel
from vlm.families.parts import get_part_names
from vlm.train.parts import Part
from vlm.train.sharding import reshard

TRAINED_WEIGHTS = "trained.safetensors"
"""The file of a checkpoint that holds them, if they are not sharded."""


def trained_tensors(model: TrainableModel, parts: list[Part]) -> dict[str, Tensor]:
    """Return the tensors that training changes: parameters with a gradient, and saved buffers of parts that train."""
    reshard(model)  # pyright: ignore[reportArgumentType] - every such model is a module
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names, saved = get_part_names(model.config), model.state_dict().keys()
    training = {part.name for part in parts if part.is_trainable}
    buffers = {name: b for name, b in model.named_buffers() if name in saved and names.part_of(name) in training}
    return {**parameters, **buffers}
