"""Images with the labels of what they show, from records: for questions about objects that are there, or are not."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm.data.records.open import stream_records
from vlm.data.sample import BadSample, Record

LABEL_KEYS = ("label", "name", "category")
"""Keys of an object that may hold its label; the first that is there counts."""


@dataclass(frozen=True)
class LabelledImage:
    """An image, as its records name it, and the different labels of its objects, in order."""

    image: str
    labels: tuple[str, ...]


def read_labelled_images(
    source: str, cache: Path, *, key: str = "objects", synonyms: Mapping[str, str] | None = None
) -> list[LabelledImage]:
    """Return the images of a file of records; those of several records have the labels of all of them.

    Args:
        source: the file, in any form that records are read from.
        cache: the folder of record indices.
        key: the key of a record's objects: a list of labels, or of mappings with a label.
        synonyms: label -> the label that stands for it.

    Raises:
        ValueError: a record names no image file or not one alone, has objects of another form, or none has any.
    """
    found: dict[str, dict[str, None]] = {}
    for number, record in enumerate(stream_records(source, cache)):
        if isinstance(record, BadSample):
            raise record
        if not isinstance(record, dict):
            raise ValueError(f"{source}, record {number}: a JSON object is needed, got {record!r:.60}")
        labels = (_normalise(label) for label in _read_labels(record, key, f"{source}, record {number}"))
        image = _read_image(record, f"{source}, record {number}")
        found.setdefault(image, {}).update(dict.fromkeys((synonyms or {}).get(label, label) for label in labels))
    images = [LabelledImage(image, tuple(labels)) for image, labels in found.items()]
    if not any(image.labels for image in images):
        raise ValueError(f"{source}: no record has labelled objects under `{key}`; name their key with --objects-key")
    return images


def read_synonyms(file: Path | None) -> dict[str, list[str]]:
    """Return label -> its synonyms, from lines such as `dog, puppy, hound`; nothing without a file.

    Raises:
        ValueError: a word is in two lines.
    """
    groups: dict[str, list[str]] = {}
    known: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file is not None else ():
        names = [name for part in line.split(",") if (name := _normalise(part))]
        for name in names:
            if known.setdefault(name, names[0]) != names[0]:
                raise ValueError(f"{file}: {name!r} is a synonym of {known[name]!r} and of {names[0]!r}; leave one out")
        if names:
            groups[names[0]] = names[1:]
    return groups


def label_of_synonym(groups: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return synonym -> its label."""
    return {name: label for label, names in groups.items() for name in names}


def write_records(path: Path, records: Iterable[Record], *, force: bool) -> int:
    """Write records as JSON lines; return their number.

    Raises:
        ValueError: the file exists and `force` is not given, or there is no record.
    """
    if path.exists() and not force:
        raise ValueError(f"{path} exists; choose another output, or replace it with --force")
    lines = [f"{json.dumps(record, ensure_ascii=False)}\n" for record in records]
    if not lines:
        raise ValueError(f"{path}: there are no records to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _normalise(label: str) -> str:
    """Return a label in lower case, with single spaces."""
    return " ".join(label.replace("_", " ").lower().split())


def _read_labels(record: Record, key: str, where: str) -> list[str]:
    value = record.get(key)
    if isinstance(value, dict):  # ms-swift's form
        value = value.get("ref")
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{where}: `{key}` must be a list of labels, or of mappings with a label, got {value!r:.60}")
    labels = [_read_label(item) for item in value]
    if None in labels:
        raise ValueError(f"{where}: `{key}[{labels.index(None)}]` has no label ({', '.join(LABEL_KEYS)})")
    return [label for label in labels if label is not None]


def _read_label(item: object) -> str | None:
    """Return the label of an object; None if it has none."""
    if isinstance(item, dict):
        item = next((item[key] for key in LABEL_KEYS if item.get(key) is not None), None)
    return item if isinstance(item, str) and item.strip() else None


def _read_image(record: Record, where: str) -> str:
    """Return the path of a record's only image."""
    value = record.get("image") or record.get("images")
    images = value if isinstance(value, list) else [value]
    if len(images) != 1 or not isinstance(images[0], str):
        raise ValueError(f"{where}: one image file is needed, as `image`, got {value!r:.60}")
    return images[0]
