"""Readers: one record of a file as a `Sample`.

Imports the in-memory form only. To add a format, write a function `(record, image_folder) -> Sample` that raises
`BadSample`, and add it to `FORMATS`; a user's own needs no line there (`dataset.format=package.module:function`).
"""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.data.sample import PLACEHOLDER, BadSample, Picture, Sample, Turn

LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_records(path: Path) -> list[Any]:
    """The records of a JSON file (one list) or a JSONL file (one record a line).

    Raises:
        ValueError: the file is no such thing; says where it breaks.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        return records
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); one record a line is read from a file named .jsonl") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: a list of records is needed, got {type(records).__name__}")
    return records


def read_llava(record: Any, image_folder: Path) -> Sample:
    """LLaVA's form: `{"id", "image": path or list or absent, "conversations": [{"from", "value"}, …]}`.

    `<image>` in what the human says stands for the pictures in order. A lone one is moved to the start of its turn.
    """
    if not isinstance(record, dict):
        raise BadSample("?", f"a mapping is needed, got {type(record).__name__}")
    sample_id = str(record.get("id", "?"))
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise BadSample(sample_id, "`conversations` must be a list of at least one turn")
    pictures = iter(_pictures(record.get("image", record.get("images")), image_folder, sample_id))
    turns = []
    for number, turn in enumerate(conversation, start=1):
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise BadSample(sample_id, f"turn {number}: `from` and `value` must be strings")
        if turn["from"] not in LLAVA_ROLES:
            raise BadSample(sample_id, f"turn {number}: from={turn['from']!r}; allowed are {', '.join(LLAVA_ROLES)}")
        role = LLAVA_ROLES[turn["from"]]
        turns.append(Turn(role, _content(turn["value"], pictures, sample_id) if role == "user" else (turn["value"],)))
    if left := len(list(pictures)):
        raise BadSample(sample_id, f"{left} more image(s) than {PLACEHOLDER} in its text")
    if not any(turn.role == "assistant" for turn in turns):
        raise BadSample(sample_id, "no reply to learn from")
    return Sample(sample_id, tuple(turns))


def _pictures(value: Any, folder: Path, sample_id: str) -> list[Picture]:
    """The pictures of a record, as paths that stay within the image folder."""
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSample(sample_id, "`image` must be a path or a list of paths")
    pictures = []
    for name in names:
        if "://" in name:
            raise BadSample(
                sample_id, f"{name}: addresses are not fetched in training; download the picture first", name
            )
        path = folder / name
        if not os.path.isfile(path):  # unlike pathlib's, false for names that no file can have, such as base64
            raise BadSample(sample_id, f"image file {path} does not exist", name)
        if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):  # links are the user's own
            raise BadSample(sample_id, f"{name} leaves the image folder {folder}", name)
        pictures.append(Picture(path))
    return pictures


def _content(text: str, pictures: Any, sample_id: str) -> tuple[str | Picture, ...]:
    """A human turn, its placeholders replaced by pictures."""
    texts = text.split(PLACEHOLDER)
    if len(texts) == 2:
        rest = "".join(texts).strip()
        texts = ["", f"\n{rest}" if rest else ""]
    content: list[str | Picture] = [texts[0]]
    for piece in texts[1:]:
        picture = next(pictures, None)
        if picture is None:
            raise BadSample(sample_id, f"more {PLACEHOLDER} in its text than images")
        content += [picture, piece]
    return tuple(part for part in content if part != "")


Reader = Callable[[Any, Path], Sample]
FORMATS: dict[str, Reader] = {"llava": read_llava}


def reader_of(name: str) -> Reader:
    """The reader that `dataset.format` names: one of `FORMATS`, or a function `package.module:function`.

    Raises:
        ValueError: there is no such function.
    """
    if name in FORMATS:
        return FORMATS[name]
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"dataset.format={name}: {error}") from error
