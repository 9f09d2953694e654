"""What a published file may say of where things come from: names on the Hub, and no path of this machine.

Imports nothing of `vlm`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LOCAL_PATH = re.compile(r"(?:/|~/|\.{1,2}/|[A-Za-z]:[\\/])[^\s/\\]+[\\/]\S+")
"""What looks like a path of a machine; a token `/` or `</s>` does not."""

PATH_KEYS = ("_name_or_path", "name_or_path")
"""Keys that say where something was loaded from, and that nothing reads: they go where that is no name on the Hub."""


def find_hub_name(name: Any, checkpoint: Path) -> str | None:
    """A name on the Hub; None where it is none, or may be a folder of this machine.

    Args:
        name: what a run was given.
        checkpoint: what the run left: relative paths began somewhere above it.
    """
    name = str(name or "").removeprefix("hf://").removeprefix("datasets/")
    if not HUB_NAME.fullmatch(name) or name.endswith((".json", ".jsonl", ".parquet", ".csv", ".tar")):
        return None
    places = [Path.cwd(), *checkpoint.resolve().parents]
    return None if any((place / name.partition("/")[0]).is_dir() for place in places) else name


def last_path_component(path: str) -> str:
    """The last component of a path, of whatever system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def without_paths(values: Any, checkpoint: Path) -> Any:
    """Configuration as it may be read by everybody: where a path stood, its last component stands, or nothing."""
    if isinstance(values, dict):
        return {
            key: cleaned
            for key, value in values.items()
            if (cleaned := _clean_value(key, value, checkpoint)) != PATH_KEYS
        }
    if isinstance(values, list):
        return [without_paths(value, checkpoint) for value in values]
    return last_path_component(values) if isinstance(values, str) and LOCAL_PATH.fullmatch(values) else values


def _clean_value(key: str, value: Any, checkpoint: Path) -> Any:
    """A value of a dictionary; `DROPPED` where it goes."""
    if isinstance(value, str) and key in PATH_KEYS:
        return value if find_hub_name(value, checkpoint) else PATH_KEYS
    if isinstance(value, str) and key == "hf_name":
        return value if find_hub_name(value, checkpoint) else last_path_component(value)
    return without_paths(value, checkpoint)


def find_local_paths(folder: Path, *checkpoints: Path) -> Iterator[str]:
    """Texts in a folder that name a place of this machine: `FILE mentions PLACE`."""
    own = {Path.home(), Path.cwd(), *(checkpoint.resolve().parent for checkpoint in checkpoints)}
    places = sorted(str(place) for place in own if len(place.parts) > 2)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".md", ".py", ".jinja"):
            text = file.read_text(encoding="utf-8")
            yield from (f"{file.name} mentions {place}" for place in places if place in text)
