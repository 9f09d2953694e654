"""FSDP2 (`trainer.sharding=fsdp2`): weights, gradients and optimiser states are sharded over the ranks.

PyTorch's `fully_shard` turns each parameter into a `DTensor`, of which a rank holds a slice of rows. A unit gathers its
parameters for its forward and backward pass: each repeated layer of encoders and decoders is one, and all that stands
between them is another, which stays gathered from the start of a step's forward pass to the end of its backward pass.
So parts of the model can be called by themselves within a step, and ranks need not make the same calls.

transformers trains a model that is sharded already as it is (`is_distributed_loading_by_transformers`). accelerate's
own FSDP2 is left out: it knows no CPU, and its units are classes of layers that it looks up by their names.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from vlm.assembly.model_kinds import is_composed_config, is_prediction_config, is_prediction_model
from vlm.assembly.native import encodes_sizes_together
from vlm.train.model import compute_dtype
from vlm.train.parts import Part
from vlm.train.step.compile import repeated_layers


def check_same_calls(config: PreTrainedConfig) -> None:
    """Check that ranks that share weights call a model's visual encoder equally often, whatever their images are.

    Raises:
        ValueError: it reads images at native resolution, in a call for each size.
    """
    body = config.body_config if is_prediction_config(config) else config
    if not is_composed_config(body) or body.native is None or encodes_sizes_together(body.vision_config):
        return
    raise ValueError(
        f"dataset.image_mode=native: a visual encoder of model_type={body.vision_config.model_type} runs once for "
        "each size of images, so ranks that shard weights (ZeRO-3, trainer.sharding=fsdp2) would wait for each other; "
        "choose trainer/deepspeed=zero2, or model/visual_encoder=siglip2-naflex or qwen2.5-vl-vit"
    )


def shard_model(model: PreTrainedModel, parts: Sequence[Part], args: TrainingArguments) -> None:
    """Shard a model over all ranks, in place and on their devices; `parts` hold the sharded parameters afterwards.

    Parameters are gathered in the run's precision, those of prediction heads in float32; gradients are reduced in
    float32.

    Raises:
        ValueError: a parameter is a single number, which has no rows to share.
    """
    if scalars := [name for name, parameter in model.named_parameters() if parameter.ndim == 0]:
        raise ValueError(
            f"trainer.sharding=fsdp2: {scalars[0]} is a single number, which FSDP2 cannot shard; choose "
            "trainer.deepspeed=zero3"
        )
    mesh = init_device_mesh(args.device.type, (dist.get_world_size(),))
    dtype = compute_dtype(args)
    # Autocast decides the precision of each operation, so that inputs such as the weights of losses keep theirs.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in repeated_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for head in model.heads.values() if is_prediction_model(model) else ():
        fully_shard(head, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    sharded = dict(model.named_parameters())
    for part in parts:
        part.parameters.update({name: sharded[name] for name in part.parameters})
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")  # which gathers, as `forward` does
    # A part of the model that is called before the whole would take itself for the whole.
    model._get_fsdp_state()._lazy_init()  # pyright: ignore[reportCallIssue] - `fully_shard` changed its class


def gather_shared(model: nn.Module) -> None:
    """Gather what stands between the layers of a sharded model, so that its parts can be called by themselves."""
    if isinstance(model, FSDPModule):
        model.unshard()


def reshard(model: nn.Module) -> None:
    """Let go of what the last forward pass gathered, so that the parameters of the model are the sharded ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state of a sharded model by its names, on the CPU of rank 0; empty on other ranks."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # pyright: ignore[reportReturnType] - tensors alone


def shard_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return a whole tensor as a parameter is stored: this rank's slice of it, where the parameter is sharded."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextmanager
def original_class(model: nn.Module) -> Iterator[None]:
    """Within, a model has the class that it had before it was sharded, under which it is saved."""
    sharded: Any = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = sharded.__mro__[2]  # behind the class that `fully_shard` made, and `FSDPModule`
    try:
        yield
    finally:
        model.__class__ = sharded
