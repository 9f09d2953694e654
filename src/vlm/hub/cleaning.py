"""Cleaning published files: where things come from is told by names on the Hub, and by no path of this machine.

Imports nothing of `vlm`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LOCAL_PATH = re.compile(r"(?:/|~/|\.{1,2}/|[A-Za-z]:[\\/])[^\s/\\]+[\\/]\S+")
"""Matches paths of a machine; a token `/` or `</s>` does not match."""

PATH_KEYS = ("_name_or_path", "name_or_path")
"""Keys that say where something was loaded from, which nothing reads: removed unless they hold a name on the Hub."""


def find_hub_name(name: object, checkpoint: Path) -> str | None:
    """Return a name on the Hub; None where it is no such name, or may be a folder of this machine.

    Relative paths of a run began somewhere above its `checkpoint`.
    """
    name = str(name or "").removeprefix("hf://").removeprefix("datasets/")
    if not HUB_NAME.fullmatch(name) or name.endswith((".json", ".jsonl", ".parquet", ".csv", ".tar")):
        return None
    places = [Path.cwd(), *checkpoint.resolve().parents]
    return None if any((place / name.partition("/")[0]).is_dir() for place in places) else name


def last_path_component(path: str) -> str:
    """Return the last component of a path, of any operating system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def without_paths(values: object, checkpoint: Path) -> Any:
    """Return a configuration in which the last component of each path replaces the path, or nothing does."""
    if isinstance(values, dict):
        cleaned = {}
        for key, value in values.items():
            if not isinstance(value, str) or key not in (*PATH_KEYS, "hf_name"):
                cleaned[key] = without_paths(value, checkpoint)
            elif find_hub_name(value, checkpoint):
                cleaned[key] = value
            elif key == "hf_name":
                cleaned[key] = last_path_component(value)
        return cleaned
    if isinstance(values, list):
        return [without_paths(value, checkpoint) for value in values]
    return last_path_component(values) if isinstance(values, str) and LOCAL_PATH.fullmatch(values) else values


def find_local_paths(folder: Path, *checkpoints: Path) -> Iterator[str]:
    """Yield `FILE mentions PLACE` for each text file of a folder that names a place of this machine."""
    folders = {Path.home(), Path.cwd(), *(checkpoint.resolve().parent for checkpoint in checkpoints)}
    places = sorted(str(place) for place in folders if len(place.parts) > 2)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".md", ".py", ".jinja"):
            text = file.read_text(encoding="utf-8")
            yield from (f"{file.name} mentions {place}" for place in places if place in text)
