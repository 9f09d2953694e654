"""Inspects the files of a checkpoint before a library opens them: no pipes, no endless files, no incomplete ones.

`inspect_folder` refuses, with the file's name: anything but regular files; JSON that is no object, too large or too
deep; an index that does not match the files next to it; incomplete safetensors files. It reads headers but no weights,
and imports no torch. To inspect another file, add it to `MAX_JSON_BYTES`.
"""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

MEGABYTE = 1 << 20
MAX_JSON_BYTES = {
    "config.json": 16 * MEGABYTE,
    "base.json": 16 * MEGABYTE,
    "adapter_config.json": 16 * MEGABYTE,
    "generation_config.json": MEGABYTE,
    "preprocessor_config.json": MEGABYTE,
    "processor_config.json": MEGABYTE,
    "video_preprocessor_config.json": MEGABYTE,
    "chat_template.json": MEGABYTE,
    "special_tokens_map.json": MEGABYTE,
    "tokenizer_config.json": 64 * MEGABYTE,
    "added_tokens.json": 64 * MEGABYTE,
    "model.safetensors.index.json": 256 * MEGABYTE,
    "pytorch_model.bin.index.json": 256 * MEGABYTE,
}
"""JSON files of a checkpoint -> their maximum size in bytes."""
MAX_BYTES = {
    "chat_template.jinja": MEGABYTE,
    **dict.fromkeys(
        ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"), 256 * MEGABYTE
    ),
}
"""Other files of a checkpoint -> their maximum size in bytes."""
LISTS = ("chat_template.json",)
"""JSON files that need not be objects."""
MAX_DEPTH = 64
"""Maximum nesting depth of a JSON file; those of models have fewer than ten levels."""
MAX_SHOWN = 80
"""Maximum number of characters that a message shows of a name or value from a file."""

SAFETENSORS = "model.safetensors"
INDEX = f"{SAFETENSORS}.index.json"
PICKLE = "pytorch_model.bin"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OTHER_WEIGHTS = (ADAPTER_WEIGHTS, "non_lora_trainables.safetensors")

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}  # fmt: skip
"""Types of tensors in safetensors files -> bits of a number."""
PACKED = ("U8", "I8", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0")
"""Types in which quantised weights are stored."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as its file's header describes it: its type as safetensors spells it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether its numbers are floating-point numbers of at least 16 bits."""
        return self.dtype in ("F16", "BF16", "F32", "F64")


def inspect_folder(folder: Path) -> None:
    """Refuse a folder whose files cannot be those of a complete checkpoint; see the top of this file.

    A folder that has not changed since the last inspection is not inspected again.

    Raises:
        ValueError: with the name of the file, and what is wrong with it.
    """
    _inspect_once(folder, _state_of(folder))


def _state_of(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, inode, size and time of each file of a folder; links are followed unless they are dead."""
    states = []
    for entry in os.scandir(folder):
        try:
            status = entry.stat()
        except OSError:
            status = entry.stat(follow_symlinks=False)
        states.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(sorted(states))


@lru_cache(64)
def _inspect_once(folder: Path, state: tuple[tuple[str, int, int, int], ...]) -> None:
    """Inspect a folder's files; `state` is its `_state_of`, so that a changed folder is inspected again."""
    for name in MAX_JSON_BYTES:
        if os.path.lexists(folder / name):
            read_object(folder / name)
    for name, most in MAX_BYTES.items():
        if os.path.lexists(folder / name):
            check_regular(folder / name, most)
    read_headers(folder)
    for name in OTHER_WEIGHTS:
        if os.path.lexists(folder / name):
            read_header(folder / name)
    _check_adapter(folder)


def _check_adapter(folder: Path) -> None:
    """Raise ValueError if a folder has an adapter's settings or weights, and not the other."""
    settings, weights = (os.path.lexists(folder / name) for name in ("adapter_config.json", ADAPTER_WEIGHTS))
    if weights and not settings:
        raise ValueError(f"{folder} has {ADAPTER_WEIGHTS}, but adapter_config.json is missing")
    if settings and not weights and not os.path.lexists(folder / "adapter_model.bin"):
        raise ValueError(f"{folder} has adapter_config.json, but {ADAPTER_WEIGHTS} is missing")


# Files


def check_regular(file: Path, max_bytes: int | None = None) -> int:
    """Return the size of a file; refuse anything but regular files, which might block or never end.

    Raises:
        ValueError: it is a folder, pipe, device or dead link, may not be read, or is larger than `max_bytes`.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{file} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
        kind = next((name for test, name in kinds if test(status.st_mode)), "device")
        raise ValueError(f"{file} is a {kind}; a regular file is needed")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"{file} has {status.st_size:,} bytes; at most {max_bytes:,} are allowed")
    if not os.access(file, os.R_OK):
        raise ValueError(f"{file} cannot be opened: Permission denied")
    return status.st_size


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file of a checkpoint.

    Raises:
        ValueError: it is no regular file, too large, no JSON, too deeply nested, or no object.
    """
    is_setting = file.name in MAX_JSON_BYTES
    check_regular(file, MAX_JSON_BYTES.get(file.name, 256 * MEGABYTE))
    try:
        content = json.loads(file.read_bytes().decode("utf-8"), parse_constant=_refuse_nan if is_setting else float)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not JSON: it is not in UTF-8 (byte {error.start:,})") from error
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply: at most {MAX_DEPTH} levels are allowed") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {str(error)[:MAX_SHOWN]}") from error
    if not isinstance(content, dict) and file.name not in LISTS:
        raise ValueError(f"{file} holds {_kind(content)}; a JSON object is needed")
    _check_depth(file, content)
    return content if isinstance(content, dict) else {}


def shown(text: object) -> str:
    """Return a name or value from a file for a message: short, without control characters."""
    printed = text if isinstance(text, str) and text.isprintable() else ascii(text)
    return printed if len(printed) <= MAX_SHOWN else f"{printed[:MAX_SHOWN]}…"


def _refuse_nan(name: str) -> float:
    """Return an infinite number, which some configurations have; refuse NaN."""
    if name == "NaN":
        raise ValueError("a value is NaN")
    return float(name)


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _check_depth(file: Path, content: object) -> None:
    """Raise ValueError if JSON is nested too deeply for libraries that walk through it recursively."""
    level = [content] if isinstance(content, dict | list) else []
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{file} is nested too deeply: at most {MAX_DEPTH} levels are allowed")
        children = (value.values() if isinstance(value, dict) else value for value in level)
        level = [child for values in children for child in values if isinstance(child, dict | list)]


# Weights


def read_headers(folder: Path) -> dict[str, TensorHeader] | None:
    """Return the headers of all tensors of a model's safetensors files; None if the folder has no such files.

    Raises:
        ValueError: a file is missing or not whole, or the index does not fit the files.
    """
    if os.path.lexists(folder / SAFETENSORS):
        return read_header(folder / SAFETENSORS)
    if not os.path.lexists(folder / INDEX):
        _check_pickles(folder)
        return None
    index = folder / INDEX
    shards = _indexed_files(index, ".safetensors")
    headers: dict[str, TensorHeader] = {}
    for name, listed in shards.items():
        held = read_header(folder / name)
        if lacking := sorted(listed - held.keys()):
            raise ValueError(f"{index} says that {shown(lacking[0])} is in {shown(name)}, which does not contain it")
        if twice := sorted(held.keys() & headers.keys()):
            raise ValueError(f"{folder}: {shown(twice[0])} is in two of the files that {INDEX} names")
        headers |= held
    return headers


def _check_pickles(folder: Path) -> None:
    """Check the files of a model in PyTorch's own format, from which transformers reads only tensors."""
    if os.path.lexists(folder / PICKLE):
        check_regular(folder / PICKLE)
    elif os.path.lexists(folder / f"{PICKLE}.index.json"):
        for name in _indexed_files(folder / f"{PICKLE}.index.json", ".bin"):
            check_regular(folder / name)


def _indexed_files(index: Path, suffix: str) -> dict[str, set[str]]:
    """Return file -> tensors of an index; refuses names that lead out of the folder, and files of another kind."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map that says which file holds which tensor")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(suffix):
            raise ValueError(
                f"{index} names {shown(name)} for {shown(tensor)}; a {suffix} file next to the index is needed"
            )
        files.setdefault(name, set()).add(tensor)
    for name in files:
        if not os.path.lexists(index.parent / name):
            raise ValueError(f"{index} names {shown(name)}, which is missing: the download is not complete")
    return files


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file as its header describes them; refuses incomplete files."""
    from safetensors import SafetensorError, safe_open  # only checkpoints need it

    if check_regular(file) == 0:
        raise ValueError(f"{file} is empty: the download is not complete")
    try:
        with safe_open(file, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - safe_open is no mapping
            headers = {name: TensorHeader(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        said = str(error).removeprefix("Error while deserializing header: ").splitlines()
        raise ValueError(
            f"{file} is not a complete safetensors file: {(said or ['unreadable'])[0][:MAX_SHOWN]}"
        ) from error
    for name, header in headers.items():
        if not name.isprintable():
            raise ValueError(f"{file} has a tensor named {shown(name)}; a printable name is needed")
        if header.dtype not in BITS:
            raise ValueError(f"{file}: {shown(name)} is of type {shown(header.dtype)}, which is not a type of weights")
    return headers


def nested_objects(content: Mapping[str, Any], skip: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield dotted key and content of a JSON object (with the key `""`) and of each object nested in it."""
    waiting: list[tuple[str, Any]] = [("", dict(content))]
    while waiting:
        path, value = waiting.pop()
        yield path, value
        waiting += [
            (f"{path}.{key}" if path else key, child)
            for key, child in value.items()
            if isinstance(child, dict) and key not in skip
        ]
