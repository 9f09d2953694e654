"""Reads the files of a folder within bounds: missing files are empty; damaged ones are named and left out.

A run directory may come from someone else, be written to at the moment, or be truncated by a full disk. So nothing here
raises because of its content. Only regular files are read. Imports no torch.
"""

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import yaml

JsonObject = dict[str, object]
"""A JSON object: texts, numbers, lists and objects by name."""

MEGABYTE = 1 << 20
MAX_TEXT_BYTES = 64 * MEGABYTE
"""The longest text, log or table that is read, in bytes; of a longer one, its beginning or end is read."""
MAX_JSON_BYTES = 16 * MEGABYTE
MAX_YAML_BYTES = MEGABYTE
TAIL_BYTES = 64 * 1024
"""How much of a file's end `tail` returns."""
MAX_DEPTH = 32
"""Maximum nesting depth of a JSON or YAML file."""

SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader in C, which is ten times as fast, if PyYAML was built with it."""


class Folder:
    """A folder whose files are read within bounds.

    Attributes:
        path: the folder.
        damaged: name of an existing file that could not be parsed -> the reason.
    """

    def __init__(self, path: Path):
        self.path = path
        self.damaged: dict[str, str] = {}

    def has(self, name: str) -> bool:
        """Return whether there is a regular file of this name."""
        return self._size(name) is not None

    def _size(self, name: str) -> int | None:
        try:
            status = (self.path / name).stat()
        except (OSError, ValueError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def modified(self, name: str) -> float | None:
        """Return when a file was last written, in seconds since 1970; None if it is missing."""
        try:
            return (self.path / name).stat().st_mtime
        except OSError:
            return None

    def _read(self, name: str, start: int, length: int) -> bytes:
        """Return bytes of a file; empty if it cannot be read, which is noted."""
        try:
            with (self.path / name).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            self.damaged[name] = error.strerror or str(error)
            return b""

    def text(self, name: str, most: int = MAX_TEXT_BYTES) -> str:
        """Return the text of a file, its first `most` bytes; empty if there is none."""
        size = self._size(name)
        if size is None:
            return ""
        if size > most:
            self.damaged[name] = f"{size:,} bytes; only the first {most:,} were read"
        return self._read(name, 0, most).decode("utf-8", errors="replace")

    def tail(self, name: str, most: int = TAIL_BYTES) -> str:
        """Return the last whole lines of a file, and a last one without end; empty if there is none."""
        size = self._size(name)
        if size is None:
            return ""
        text = self._read(name, max(0, size - most), most).decode("utf-8", errors="replace")
        return text if size <= most else text.partition("\n")[2]  # the first line is incomplete

    def json(self, name: str) -> JsonObject:
        """Return the JSON object of a file; empty if it is missing, or damaged, which is noted."""
        size = self._size(name)
        if size is None:
            return {}
        if size > MAX_JSON_BYTES:
            self.damaged[name] = f"{size:,} bytes; at most {MAX_JSON_BYTES:,} are read"
            return {}
        try:
            return _as_object(msgspec.json.decode(self._read(name, 0, MAX_JSON_BYTES)))
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self.damaged[name] = f"not a JSON object: {error}"
            return {}

    def yaml(self, name: str) -> JsonObject:
        """Return the mapping of a YAML file of plain values; empty if it is missing, or damaged, which is noted."""
        size = self._size(name)
        if size is None:
            return {}
        if size > MAX_YAML_BYTES:
            self.damaged[name] = f"{size:,} bytes; at most {MAX_YAML_BYTES:,} are read"
            return {}
        text = self.text(name)
        try:
            if "&" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, SAFE_LOADER)):
                raise ValueError("it has aliases")  # of a few bytes they make gigabytes
            return _as_object(yaml.load(text, SAFE_LOADER))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.damaged[name] = f"not a YAML mapping: {error}".splitlines()[0]
            return {}

    def json_lines(self, name: str, most: int = MAX_TEXT_BYTES) -> list[JsonObject]:
        """Return the JSON objects of a file with one on each line; lines that are damaged are counted and left out.

        An incomplete last line is being written and does not count as damage.
        """
        *lines, _ = self.text(name, most).split("\n")
        objects = [found for line in lines if (found := parse_line(line)) is not None]
        if lost := sum(bool(line.strip()) for line in lines) - len(objects):
            self.damaged[name] = f"{lost:,} of {len(lines):,} lines are not JSON objects"
        return objects

    def files(self, pattern: str, most: int = 1000) -> Iterator[Path]:
        """Yield the regular files below that match a pattern, by name; links that lead out of the folder are left out.

        `pattern` is one of `Path.glob`.
        """
        for file in sorted(self.path.glob(pattern))[:most]:
            if file.is_file() and is_inside(file, self.path):
                yield file


def parse_line(line: str) -> JsonObject | None:
    """Return the JSON object of a line; None for any other text."""
    if not line.startswith("{"):
        return None
    try:
        return _as_object(msgspec.json.decode(line))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _as_object(value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise ValueError("its top level is not a mapping")
    _check_depth(value, MAX_DEPTH)
    return {str(key): item for key, item in value.items()}


def _check_depth(value: object, left: int) -> None:
    if left == 0:
        raise ValueError(f"more than {MAX_DEPTH} levels")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(item, left - 1)


# Values of unknown shape


def get(value: object, *path: str) -> object:
    """Return the value at a path of nested mappings; None if there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def mapping_at(value: object, *path: str) -> JsonObject:
    """Return the mapping at a path of nested mappings; empty if there is none."""
    found = get(value, *path)
    return {str(key): item for key, item in found.items()} if isinstance(found, Mapping) else {}


def list_at(value: object, *path: str) -> list[object]:
    """Return the list at a path of nested mappings; empty if there is none."""
    found = get(value, *path)
    return found if isinstance(found, list) else []


def number_at(value: object, *path: str) -> float | None:
    """Return the number at a path of nested mappings; None if there is none, and for infinity and NaN."""
    return as_number(get(value, *path))


def text_at(value: object, *path: str) -> str:
    """Return the value at a path of nested mappings as text; empty if there is none."""
    found = get(value, *path)
    return "" if found is None else str(found)


def as_number(value: object) -> float | None:
    """Return a finite number, keeping whole numbers as such; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < float("inf") else None


def flatten(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return dotted key -> value of nested mappings; an empty mapping is left out, a list is one value."""
    flat: dict[str, object] = {}
    for name, item in value.items():
        key = f"{prefix}{name}"
        if isinstance(item, Mapping):
            flat |= flatten({str(inner): found for inner, found in item.items()}, f"{key}.")
        else:
            flat[key] = item
    return flat


def is_inside(file: Path, folder: Path) -> bool:
    """Return whether a path stays within a folder when its links are followed; the file need not exist."""
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a circle of links
        return False
