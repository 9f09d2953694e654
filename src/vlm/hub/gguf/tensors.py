"""Tensors of GGUF files: how each is stored, and writing them one at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as StoredType
from torch import Tensor

STORED_TYPES = {
    "float32": StoredType.F32,
    "float16": StoredType.F16,
    "bfloat16": StoredType.BF16,
    "q8_0": StoredType.Q8_0,
}
"""`--dtype` -> how matrices are stored; vectors are always float32, as llama.cpp needs them."""

FILE_TYPES = {
    StoredType.F32: gguf.LlamaFileType.ALL_F32,
    StoredType.F16: gguf.LlamaFileType.MOSTLY_F16,
    StoredType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    StoredType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}

FLOAT32_NAMES = ("v.position_embd.weight", "v.class_embd", "rope_freqs.weight")
"""Tensors that llama.cpp adds to others in float32."""

KERNEL_NAME = "v.patch_embd.weight"
"""The kernel that llama.cpp convolves in float16 or float32 alone."""

DEPTHWISE_NAME = "mm.model.peg.0.weight"
"""The kernel that llama.cpp convolves in float16 alone."""


class Change(NamedTuple):
    """What llama.cpp's values are to the checkpoint's, forth and back."""

    apply: Callable[[Tensor], Tensor]
    undo: Callable[[Tensor], Tensor]


AS_IT_IS = Change(lambda tensor: tensor, lambda tensor: tensor)


class PlannedTensor(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
        name: llama.cpp's name.
        source: the weight in the checkpoint, by its name there; None where the value is computed.
        shape: its shape in the file, in PyTorch's order.
        stored: how it is stored.
        change: from the checkpoint's value to the file's.
        value: what is computed.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    stored: StoredType
    change: Change = AS_IT_IS
    value: Tensor | None = None


def choose_stored_type(name: str, shape: Sequence[int], wanted: StoredType) -> StoredType:
    """Return how a tensor is stored where matrices are wanted in a type."""
    if len(shape) < 2 or name in FLOAT32_NAMES:
        return StoredType.F32
    if name == DEPTHWISE_NAME:
        return StoredType.F16
    if name == KERNEL_NAME:
        return StoredType.F16 if wanted == StoredType.F16 else StoredType.F32
    if wanted == StoredType.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return StoredType.F16  # rows do not divide into blocks
    return wanted


def encode(tensor: Tensor, planned: PlannedTensor) -> np.ndarray:
    """Return what is stored of a checkpoint's tensor.

    Raises:
        ValueError: a value is too large for the type.
    """
    values = planned.change.apply(tensor.detach().float()).contiguous()
    if planned.stored == StoredType.F16 and values.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"{planned.name} has values that float16 cannot hold: choose --dtype bfloat16 or float32")
    return gguf.quantize(values.numpy(), planned.stored)


def decode(tensor: gguf.ReaderTensor, planned: PlannedTensor) -> Tensor:
    """Return a stored tensor as the checkpoint has it, in float32."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=True)
    return planned.change.undo(torch.from_numpy(values))


class TensorFile:
    """A GGUF file whose tensors arrive in any order that the plan has.

    Args:
        path: the file.
        writer: holds the metadata.
        plan: the tensors, in the order in which `add` gets them; computed ones may stand anywhere.
    """

    def __init__(self, path: Path, writer: gguf.GGUFWriter, plan: Sequence[PlannedTensor]):
        self.writer = writer
        self.computed = [planned for planned in plan if planned.value is not None]
        self.by_source: Mapping[str, PlannedTensor] = {
            planned.source: planned for planned in plan if planned.source is not None
        }
        for planned in [*self.computed, *self.by_source.values()]:
            rows, stored = planned.shape, planned.stored
            size = gguf.quant_shape_to_byte_shape(rows, stored) if stored not in _NUMPY_TYPES else rows
            kind = np.dtype(_NUMPY_TYPES.get(stored, np.uint8))
            writer.add_tensor_info(planned.name, size, kind, int(np.prod(size)) * kind.itemsize, raw_dtype=stored)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for planned in self.computed:
            assert planned.value is not None
            writer.write_tensor_data(encode(planned.value, planned))

    def add(self, source: str, tensor: Tensor) -> None:
        """Write a weight of the checkpoint, if the file has a place for it."""
        if (planned := self.by_source.get(source)) is not None:
            self.writer.write_tensor_data(encode(tensor, planned))

    def close(self) -> None:
        """Finish the file."""
        self.writer.close()


_NUMPY_TYPES = {StoredType.F32: np.float32, StoredType.F16: np.float16}
