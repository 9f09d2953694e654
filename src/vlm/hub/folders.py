"""Folders of checkpoints: where one is read, and a new one that appears when it is complete."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vlm.checks.checkpoint import is_hub_name, missing_folder
from vlm.checks.checkpoint_files import inspect_folder, read_object

JsonObject = dict[str, Any]
"""A JSON object of foreign content."""

NON_WEIGHT_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
"""Configuration, tokenizer and processor files."""


@contextmanager
def create_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `out` at the end; after an error nothing is left of it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not empty; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def resolve_folder(name: str) -> Path:
    """Return a local folder as it is, a name on the Hub as the folder of its download, safetensors before pickles.

    Raises:
        ValueError: there is none, or a file in it is none that a checkpoint can have.
    """
    folder = Path(name)
    if folder.is_dir():
        inspect_folder(folder)
        return folder
    if not is_hub_name(name):
        raise ValueError(missing_folder(name))
    try:
        for weights in ("*.safetensors", "*.bin"):
            folder = Path(snapshot_download(name, allow_patterns=[*NON_WEIGHT_FILES, weights]))
            if any(folder.glob(weights)):
                break
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{name} is not a local folder, and the Hub says: {str(error).splitlines()[0]}") from error
    inspect_folder(folder)
    return folder


def read_json(file: Path) -> JsonObject:
    """Return the JSON object of a file; an empty one where there is no such file.

    Raises:
        ValueError: it is no regular file, or holds no JSON object, see `read_object`.
    """
    return read_object(file) if os.path.lexists(file) else {}


def write_json(file: Path, values: JsonObject) -> None:
    """Write a JSON object in the form of configuration files."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
