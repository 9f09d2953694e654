"""Explains a lack of memory: what used it, and which keys lower it, with the cheapest first."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from vlm.checks.fields import RunFailed
from vlm.config.schema import RunConfig
from vlm.train.guards.weights import held_here
from vlm.train.monitor.speed import peak_memory

MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Parts of error messages about a lack of memory that do not come from PyTorch's own allocator."""


class OutOfMemory(RunFailed):
    """Memory ran out; the message says what used it, and what to do."""


class MemoryHolder(Protocol):
    """The attributes of the run's `VLMTrainer` that are used here."""

    model: nn.Module
    optimizer: Any
    args: TrainingArguments


@contextmanager
def explain_out_of_memory(trainer: MemoryHolder, config: RunConfig) -> Iterator[None]:
    """Context in which a lack of memory ends the run with a message on what used it, and which keys lower it.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        held = describe_held(measure_held(trainer), trainer.args.device)
        keys = "; ".join(list_remedies(config))
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OutOfMemory(f"Memory ran out: {reason}\n{held}\nTry in this order: {keys}.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device or of the machine ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or any(text in str(error) for text in MESSAGES)


def measure_held(trainer: MemoryHolder) -> dict[str, int]:
    """Return the bytes of parameters, gradients and optimiser states on this rank."""
    return {name: _num_bytes(tensors) for name, tensors in find_held(trainer).items()}


def find_held(trainer: MemoryHolder) -> dict[str, list[Tensor]]:
    """Return the tensors of parameters, gradients and optimiser states on this rank, as far as each holds them."""
    model: nn.Module = trainer.model
    parameters = [held_here(parameter) for parameter in model.parameters()]
    gradients = [held_here(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    inner = trainer.optimizer
    while hasattr(inner, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        inner = inner.optimizer
    states = [] if inner is None else list(map(held_here, _tensors(inner.state.values())))
    own = {tensor.data_ptr() for tensor in parameters}
    groups = [] if inner is None else inner.param_groups
    optimized = [held_here(parameter) for group in groups for parameter in group["params"]]
    copies = [tensor for tensor in optimized if tensor.data_ptr() not in own]  # in float32, of DeepSpeed
    return {
        "parameters": [*parameters, *model.buffers()],
        "gradients": gradients,
        "optimiser states": [*states, *copies],
    }


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """Iterate over the tensors of nested mappings and lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def describe_held(held: dict[str, int], device: torch.device) -> str:
    """Return what used memory, in words; the rest of the peak counts as activations."""
    gib = {name: number / 2**30 for name, number in held.items()}
    total = peak_memory(device)
    rest = max(total - sum(gib.values()), 0.0)
    parts = ", ".join(f"{name} {size:.2f} GiB" for name, size in gib.items())
    where = "the device" if device.type != "cpu" else "this process"
    others = f"activations and everything else {rest:.2f} GiB ({total:.2f} GiB in all at most)"
    return f"It was used on {where} by: {parts}, {others}."


def list_remedies(config: RunConfig) -> list[str]:
    """Return the keys that would lower the memory of this run, starting with those that change least."""
    trainer, data = config.trainer, config.dataset
    size, accumulation = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    remedies = []
    if size > 1:
        more = f"trainer.gradient_accumulation_steps={accumulation * 2}"
        remedies.append(f"trainer.per_device_train_batch_size={size // 2} with {more}")
    if trainer.packing:
        most = trainer.max_tokens_per_batch
        remedies.append(f"trainer.max_tokens_per_batch (now {'null' if most is None else most})")
    if not trainer.activation_checkpointing:
        remedies.append("trainer.activation_checkpointing=true")
    if not (trainer.bf16 or trainer.fp16):
        remedies.append("trainer.bf16=true")
    if trainer.sharding is None and trainer.deepspeed in (None, "zero0", "zero1", "zero2"):
        stages = "zero3" if trainer.deepspeed == "zero2" else "zero2, then zero3,"
        remedies.append(f"trainer.deepspeed={stages} on several GPUs")
    if data.max_length is None or data.max_length > 512:
        remedies.append(f"dataset.max_length (now {data.max_length})")
    if trainer.unfreeze.train_language_model or trainer.unfreeze.train_vision_model:
        remedies.append("adapters instead of whole parts (trainer.lora)")
    if data.streaming or trainer.dataloader_num_workers:
        workers = f"trainer.dataloader_num_workers (now {trainer.dataloader_num_workers})"
        remedies.append(f"for the memory of the machine, {workers}")
    return remedies
