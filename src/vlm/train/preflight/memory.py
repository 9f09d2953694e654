"""The memory of a step without sharding, predicted: what holds it. See `sharded.py` for what sharding makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

from vlm.config.schema import RunConfig
from vlm.data.batching.stats import ModelInputs
from vlm.train.objectives.base import Objective
from vlm.train.optimizers import make_optimizer
from vlm.train.parts import make_parts
from vlm.train.preflight.fake_step import BatchShape, MemoryNotCountable, StepBytes, copy_to_fake, count_step_bytes
from vlm.train.preflight.live_bytes import LiveBytes

HALF, FULL = 2, 4
"""Bytes of a number in half and in single precision."""


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of a model that is ready to train.

    Attributes:
        trained: number of elements that train.
        frozen: number of elements that do not.
        weights: bytes of all parameters and buffers, as the model holds them.
        largest_layer: the most elements of a module that is gathered at once where weights are sharded.
        hidden: width of the language model, by which `auto` sizes DeepSpeed's buffers; 0 where it has none.
    """

    trained: int
    frozen: int
    weights: int
    largest_layer: int
    hidden: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSizes":
        """Count a model, which may be on the meta device."""
        parameters = list(model.parameters())
        counts = [(_num_elements(parameter), parameter.requires_grad) for parameter in parameters]
        layers = [module for module in model.modules() if isinstance(module, nn.ModuleList) for module in module]
        lone = [module for module in model.modules() if not list(module.children())]
        largest = max((sum(map(_num_elements, module.parameters())) for module in (*layers, *lone)), default=0)
        tensors = [*parameters, *model.buffers()]
        weights = sum(_num_elements(tensor) * tensor.element_size() for tensor in tensors)
        trained = sum(count for count, trains in counts if trains)
        hidden = _hidden_size(getattr(model, "config", None))
        return cls(trained, sum(count for count, _ in counts) - trained, weights, largest, hidden)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of a device at the highest moment of a step, without sharding.

    Attributes:
        weights: parameters and buffers.
        gradients: of what trains.
        states: of the optimiser.
        activations: activations, batches and copies of weights in half precision, at most.
        peak: everything together at the highest moment; less than the sum where gradients come as activations go.
        source: what activations are known from: `counted`, or `measured in the probe`.
    """

    weights: int
    gradients: int
    states: int
    activations: int
    peak: int
    source: str = "counted"


def predict_memory(
    objective: Objective,
    model: PreTrainedModel,
    config: RunConfig,
    args: TrainingArguments,
    image: ModelInputs,
    batches: Sequence[BatchShape],
    dtype: torch.dtype,
) -> MemoryPrediction:
    """Predict the memory of a step, without sharding.

    Args:
        objective: what the model trains for.
        model: ready to train; real, or on the meta device.
        config: the run's configuration.
        args: the run's arguments, which choose the optimiser.
        image: the model's inputs for an image.
        batches: the micro-batches of a step.
        dtype: the precision of matrix products.

    Raises:
        MemoryNotCountable: the model does not run without data, or the objective's steps are of another kind.
    """
    if objective.memory_note is not None:
        raise MemoryNotCountable(objective.memory_note)
    step = count_step_bytes(model, image, batches, dtype)
    states, extra = count_optimizer_bytes(model, config, args)
    return combine(ModelSizes.of(model), step, states, extra)


def combine(sizes: ModelSizes, step: StepBytes, states: int, extra: int) -> MemoryPrediction:
    """Add up what was counted; `extra` is what the optimiser needs while it steps."""
    peak = sizes.weights + states + max(step.with_gradients, step.gradients + extra)
    return MemoryPrediction(sizes.weights, step.gradients, states, step.activations, peak)


def count_optimizer_bytes(model: PreTrainedModel, config: RunConfig, args: TrainingArguments) -> tuple[int, int]:
    """Return the bytes of the optimiser's states, and the most that it needs besides while it steps.

    An optimiser that does not run on fake tensors is taken for AdamW in single precision.
    """
    trained = sum(_num_elements(parameter) for parameter in model.parameters() if parameter.requires_grad)
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake = copy_to_fake(model, mode)
        optimizer = make_optimizer(args, fake, make_parts(fake, config.trainer, config.model), ())
        with mode:
            for parameter in fake.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            with LiveBytes() as live:
                optimizer.step()
        tensors = [state for states in optimizer.state.values() for state in states.values()]
        held = sum(_bytes(tensor) for tensor in tensors if isinstance(tensor, Tensor))
        return held, max(live.peak - held, 0)
    except Exception:  # an optimiser of the user's, or one with kernels of its own, may do anything
        return 2 * FULL * trained, 0


def _bytes(tensor: Tensor) -> int:
    return _num_elements(tensor) * tensor.element_size()


def _hidden_size(config: PretrainedConfig | None) -> int:
    """Return the width that transformers puts in place of `auto` in a configuration of DeepSpeed; 0: there is none."""
    for source in (config, getattr(config, "text_config", None)):
        width = getattr(source, "hidden_size", None) or max(getattr(source, "hidden_sizes", None) or [0])
        if width:
            return int(width)
    return 0


def _num_elements(tensor: Tensor) -> int:
    return getattr(tensor, "ds_numel", tensor.numel())
