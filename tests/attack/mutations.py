"""What a stranger may do to a checkpoint: the table of mutations, and the changes that its rows are made of."""

import copy
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

KINDS = ("composed", "family", "prediction", "adapter")
WHOLE_KINDS = ("composed", "family", "prediction")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Mutation:
    """What a stranger does to a whole checkpoint.

    Attributes:
        change: does it to a folder.
        kinds: the kinds of checkpoints that it fits.
        file: the file whose name the refusal must have.
        harmless: whether a checkpoint may also go on as if nothing had been done.
    """

    change: Callable[[Path], object]
    kinds: tuple[str, ...] = KINDS
    file: str = ""
    harmless: bool = False


MUTATIONS: dict[str, Mutation] = {}
"""Name -> what is done."""


def add(name: str, change: Callable[[Path], object], *, kinds: tuple[str, ...] = KINDS, file: str = "",
        harmless: bool = False) -> None:  # fmt: skip
    """Put a row into the table."""
    assert name not in MUTATIONS
    MUTATIONS[name] = Mutation(change, kinds, file, harmless)


def write_bytes(file: str, content: bytes) -> Callable[[Path], None]:
    """Put a file of this content in place of another."""
    return lambda folder: put(folder / file, lambda path: path.write_bytes(content))


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Remove what is at a path, and write there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    write(path)


def set_json(file: str, values: Mapping[str, Any]) -> Callable[[Path], None]:
    """Set values of a JSON file by dotted keys; `...` removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        for key, value in values.items():
            *path, last = key.split(".")
            place = content
            for step in path:
                place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
            if value is ...:
                place.pop(last, None)
            else:
                place[last] = copy.deepcopy(value)
        (folder / file).write_text(json.dumps(content))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], None], file: str = WEIGHTS) -> Callable[[Path], None]:
    """Change the tensors of a file."""

    def write(folder: Path) -> None:
        state = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        change(state)
        save_file(state, folder / file, {"format": "pt"})

    return write


def change_header(change: Callable[[dict[str, Any]], None], file: str = WEIGHTS) -> Callable[[Path], None]:
    """Change the header of a safetensors file, and leave its data."""

    def write(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return write


def cut(file: str, share: float) -> Callable[[Path], None]:
    """Keep the first part of a file, as a download that was interrupted does."""

    def write(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return write


def with_index(change: Callable[[dict[str, Any], Path], None]) -> Callable[[Path], None]:
    """Give the weights an index of two shards, and change that."""

    def write(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        names = sorted(state)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for shard, held in shards.items():
            save_file({name: state[name].clone() for name in held}, folder / shard, {"format": "pt"})
        (folder / WEIGHTS).unlink()
        weight_map = {name: shard for shard, held in shards.items() for name in held}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        change(index, folder)
        (folder / INDEX).write_text(json.dumps(index))

    return write


def first(names: Any, word: str) -> str:
    """The first name with a word in it."""
    return next(name for name in sorted(names) if word in name)


def remove(word: str) -> Callable[[dict[str, Any]], None]:
    """Remove all tensors with a word in their names."""

    def change(state: dict[str, Any]) -> None:
        for name in [name for name in state if word in name]:
            del state[name]

    return change


def replace_tensor(word: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    """Replace the first tensor with a word in its name."""

    def change(state: dict[str, Any]) -> None:
        name = first(state, word)
        state[name] = make(state[name])

    return change


def rename_tensor(word: str, new: str) -> Callable[[dict[str, Any]], None]:
    """Rename the first tensor with a word in its name."""
    return lambda state: state.update({new: state.pop(first(state, word))})
