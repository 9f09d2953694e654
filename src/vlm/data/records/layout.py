"""How a JSON file holds its records: one on each line, in a list, or in a list within a mapping. Its content decides.

Imports the standard library, msgspec and siblings.
"""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from vlm.data.records.files import check_is_records, open_bytes, uncompressed_file
from vlm.data.records.guess import describe_collection
from vlm.data.records.paths import LINE_SUFFIXES, split_suffix

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_PROBED_LINE = 64 << 20
"""Whether a line is a JSON value is checked only for lines of at most this many bytes."""
RECORD_KEYS = frozenset(("conversations", "messages", "texts", "instruction", "question", "caption", "prompt", "query"))
"""Keys of single records, whose lists are not lists of records."""


@dataclass(frozen=True)
class Layout:
    """How a file holds its records.

    Attributes:
        lines: whether each line is one.
        key: the key of the list in a mapping; None if the file is the list.
    """

    lines: bool
    key: str | None = None


def find_layout(path: Path) -> Layout:
    """Return how a JSON file holds its records. Only the first lines are read if they are enough to tell.

    Raises:
        ValueError: it holds no records, or several lists; the message says what it holds and what reads it.
    """
    check_is_records(path)
    is_named_lines = split_suffix(str(path))[0] in LINE_SUFFIXES
    with open_bytes(path) as file:
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        lines = _read_lines(file)
    begin = lines[0][:1] if lines else b""
    has_value_a_line = bool(lines) and (len(lines) > 1 or is_named_lines) and _is_json(lines[0])
    if begin == b"{":
        return Layout(lines=True) if has_value_a_line else _find_wrapped_list(path, is_named_lines=is_named_lines)
    if begin == b"[":
        return Layout(lines=is_named_lines and has_value_a_line and len(lines) > 1)
    return Layout(lines=is_named_lines)


def _read_lines(file: BinaryIO) -> list[bytes]:
    """Read the first two lines that are not empty; of a list on one line, only its beginning."""
    lines: list[bytes] = []
    while len(lines) < 2 and (line := file.readline(LONGEST_PROBED_LINE)):
        if line.strip():
            lines.append(line.strip())
    return lines


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _find_wrapped_list(path: Path, *, is_named_lines: bool) -> Layout:
    """Return the layout of a file that begins as a mapping but does not have one record on each line."""
    try:
        with uncompressed_file(path) as plain:
            members = decode_members(plain)
            first_items = {key: item for key, value in members.items() if (item := _first_item(value)) is not None}
    except msgspec.DecodeError as error:
        if is_named_lines:
            return Layout(lines=True)  # broken lines, each of them a record's own trouble
        raise ValueError(
            f"{path}: not JSON ({error}); a list of records is needed, or one record on each line. jq -c . OLD > "
            "NEW.jsonl fixes JSON values that follow one another"
        ) from None
    if known := describe_collection(first_items):
        raise ValueError(f"{path}: {known.format(path=path)}")
    wrapped = [key for key in first_items if key not in RECORD_KEYS]
    if len(wrapped) == 1 and not RECORD_KEYS & members.keys():
        return Layout(lines=False, key=wrapped[0])
    keys = ", ".join(members)
    if RECORD_KEYS & members.keys():
        raise ValueError(
            f"{path}: it is a single record ({keys:.200}), and a list of records is needed: "
            f"jq -s . {path} > records.json makes it one"
        )
    needed = "a list of records is needed, or one record on each line"
    choices = f"; jq '.{wrapped[0]}' OLD > NEW.json takes one of its lists" if wrapped else ""
    raise ValueError(f"{path}: {needed}, got an object with the keys {keys:.200}{choices}")


def decode_members(path: Path) -> dict[str, msgspec.Raw]:
    """Return the members of a file that is one JSON object, as views of it, which stays mapped.

    Raises:
        msgspec.DecodeError: it is not such a file.
    """
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = len(BYTE_ORDER_MARK) if content[:3] == BYTE_ORDER_MARK else 0
    return msgspec.json.decode(content[start:], type=dict[str, msgspec.Raw])


def _first_item(value: msgspec.Raw) -> dict[str, object] | None:
    """Return the first item of a list of mappings; None for any other value."""
    content = memoryview(value)
    if bytes(content[:1]) != b"[":
        return None
    items = msgspec.json.decode(content, type=list[msgspec.Raw])
    first = msgspec.json.decode(items[0]) if items else None
    return first if isinstance(first, dict) else None
