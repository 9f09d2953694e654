"""Weights shard by shard: one tensor read, one shard held until it is written.

Imports `vlm.hub` only. Pickles are read with `weights_only=True`, so no code in them runs, and mapped rather than read
where PyTorch wrote them as archives (since 2020).
"""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.hub.folders import read_json, write_json

LARGEST_SHARD = 4 * 10**9
"""Most bytes of a written file."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights, safetensors before pickles; empty where there are none."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = read_json(folder / f"{stem}.index.json")
        files = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise ValueError(f"{folder / stem}.index.json names {file.name}, which is not in the folder")
        if files or (folder / stem).is_file():
            return files or [folder / stem]
    return []


def read_shard(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a file, one at a time; refuses incomplete files."""
    if file.suffix != ".safetensors":
        yield from read_pickle(file).items()
        return
    try:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, weights.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def read_meta_tensors(file: Path) -> dict[str, Tensor]:
    """Return names and shapes of a file as tensors of the meta device; refuses incomplete files."""
    if file.suffix != ".safetensors":
        return {name: tensor.to("meta") for name, tensor in read_pickle(file).items()}
    try:
        with safe_open(file, "pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - it is no mapping
            return {name: torch.empty(tensor.get_shape(), device="meta") for name, tensor in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.bin` file; refuses pickles that ask for more than tensors, and incomplete ones."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: it contains more than tensors, so loading it could run code. "
            f"PyTorch says: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # an incomplete pickle may raise anything
        raise ValueError(f"{file} does not load: {type(error).__name__} {error}".splitlines()[0]) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{file} does not contain named tensors")
    return tensors


class ShardWriter:
    """Writes tensors into safetensors files of at most `max_bytes` bytes (or one tensor), and their index."""

    def __init__(self, folder: Path, max_bytes: int = LARGEST_SHARD):
        self.folder = folder
        self.max_bytes = max_bytes
        self.names: list[list[str]] = []
        self.total = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a copy of a tensor: the file that it was read from may be closed afterwards."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the remaining tensors; a single file is `model.safetensors`, several get an index."""
        self._flush()
        count = len(self.names)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.names):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._part(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self.names)), metadata={"format": "pt"})
        self.names.append(list(self._pending))
        self.total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"
