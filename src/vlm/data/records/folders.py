"""What a folder holds that was named in place of records: for messages. Imports the standard library and `paths`."""

import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from mimetypes import guess_type
from pathlib import Path

from vlm.data.records.paths import RECORD_SUFFIXES, names_records

MAX_FILES = 100_000
"""Files that are looked at; a folder with more is described by these."""
KINDS = {"image": "image", "video": "video", "text": "text file"}
"""The first part of a MIME type -> what files of it are called."""


def is_empty(folder: Path) -> bool:
    """Return whether a folder and its folders hold no files; hidden ones do not count."""
    return next(_walk(folder), None) is None


def folder_problem(folder: Path, key: str) -> str | None:
    """Return why a folder holds nothing to train on, with what to do; None if it may hold records.

    Folders of images that are sorted into folders by their labels are records for prediction heads.

    Args:
        folder: the folder.
        key: the key that names it: `dataset.path`, `dataset.eval_path`, `dataset.sources.NAME.path` and the like.
    """
    counts, places = Counter[str](), set[str]()
    for place, name in islice(_walk(folder), MAX_FILES):
        kind = (guess_type(name)[0] or "").partition("/")[0]
        if kind not in KINDS or names_records(name):
            return None
        counts[kind] += 1
        places.add(place)
    if not counts:
        return "the folder is empty"
    if len(places) > 1 and set(counts) == {"image"}:
        return None
    listing = " and ".join(_count(number, KINDS[kind]) for kind, number in sorted(counts.items()))
    found = f"it is a folder of {listing}, without a file of records. "
    names = ", *".join(RECORD_SUFFIXES)
    stem = key.removesuffix("path")
    told = f"{key}=captions.csv {stem}image_folder={folder} {stem.replace('eval_', '').replace('test_', '')}format="
    if "image" in counts and "text" in counts and not stem.endswith(("eval_", "test_")):  # which are never streamed
        return (
            f"{found}Pack texts that are named like their images: tar --sort=name -cf pairs.tar -C {folder} . "
            f"(then {key}=pairs.tar dataset.format=caption dataset.streaming=true), or write a table with the columns "
            "image and caption (docs/data.md)"
        )
    if "image" in counts:
        return f"{found}Write a table with the columns image and caption, and give {told}caption (docs/data.md)"
    if "video" in counts:
        return (
            f'{found}Write records with "video": "clip.mp4" and <video> in the text, and give {key}=records.json '
            f"{stem}image_folder={folder} (docs/data.md)"
        )
    return f"{found}A file named *{names} is needed, or a folder of these (docs/data.md)"


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the folder and the name of each file that is not hidden."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((place, name) for name in names if not name.startswith("."))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"
