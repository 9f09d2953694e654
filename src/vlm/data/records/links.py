"""A folder of data may lead only to its own files. Links out of it are followed only if the user asks for it.

A folder that somebody else packed may hold links to any file of this machine, names that libraries take for addresses,
and tables of contents that name files elsewhere. Imports the in-memory form and the standard library, PyYAML where a
data set has a card.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from vlm.data.sample import BadSample, Sample

CARDS = ("README.md", ".huggingface.yaml")
"""Files that tell `datasets` which files of a folder are the data."""
MAX_CARD_BYTES = 4 << 20
ASK = "dataset.follow_links=true follows it"


@lru_cache(maxsize=1 << 12)
def _resolve(folder: str) -> str:
    return os.path.realpath(folder)


@lru_cache(maxsize=1 << 10)
def find_root(folder: str) -> str:
    """Return the real folder that files of a folder have to be in.

    It is the folder itself; for a folder of the Hub's cache, whose files are links to `blobs`, the whole repository.
    """
    real = os.path.realpath(folder)
    head, snapshots, _ = f"{real}{os.sep}".rpartition(f"{os.sep}snapshots{os.sep}")
    return head if snapshots and os.path.isdir(os.path.join(head, "blobs")) else real


def leads_outside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Return whether a path within a folder is, or goes through, a link out of it."""
    path = os.fspath(path)
    parent, name = os.path.split(os.path.abspath(path))
    real = os.path.realpath(path) if os.path.islink(path) else os.path.join(_resolve(parent), name)
    return not is_within(real, find_root(os.path.abspath(folder)))


def check_links(sample: Sample, folder: Path) -> None:
    """Raise BadSample if the name of an image or video is in the image folder but leads to a file outside."""
    paths = [image.path for image in sample.images if image.content is None]
    paths += [frame.path for video in sample.videos for frame in video.frames if frame.content is None]
    for path in [*paths, *(video.path for video in sample.videos if not video.frames)]:
        if (
            path is not None
            and is_within(os.path.abspath(path), os.path.abspath(folder))
            and leads_outside(path, folder)
        ):
            raise BadSample(
                sample.id, f"{path} is a link that leads out of the image folder {folder}; {ASK}", str(path)
            )


def list_shards(folder: Path, *, follow_links: bool) -> list[Path]:
    """Return the tar files of a folder in order, as files whatever their names are.

    Raises:
        ValueError: one is a link out of the folder, and links are not followed.
    """
    files = sorted(folder.glob("*.tar"))
    for file in files:
        if not follow_links and leads_outside(file, folder):
            raise ValueError(f"{file} is a link that leads out of its folder; {ASK}")
    return files


def check_data_folder(folder: Path, *, follow_links: bool) -> None:
    """Refuse a folder of a data set that leads elsewhere, before `datasets` opens it.

    Raises:
        ValueError: a name in it would be taken for an address, its card or its state names files elsewhere, or it has
            a link out of it and links are not followed.
    """
    for entry in _walk(folder, follow_links=follow_links):
        if "::" in entry.name or entry.name.endswith(":"):
            raise ValueError(f"{entry.path}: a name with this colon would be taken for an address; rename it")
        if not follow_links and entry.is_symlink() and leads_outside(entry.path, folder):
            raise ValueError(f"{entry.path} is a link that leads out of the folder {folder}; {ASK}")
    for file, names in _named_files(folder):
        for name in names:
            if _is_elsewhere(name):
                raise ValueError(f"{file} names {name[:80]!r}, which is not in its folder; name files of it only")


def check_data_files(files: Iterable[str], source: str) -> None:
    """Refuse data files of a data set that do not belong to it.

    Args:
        files: the files, as `datasets` resolved them.
        source: the folder, or the data set's name on the Hub.

    Raises:
        ValueError: with the file.
    """
    is_folder = os.path.isdir(source)
    for file in files:
        is_own = is_within(os.path.abspath(file), os.path.abspath(source)) and "::" not in file
        if not (is_own if is_folder else file.startswith(f"hf://datasets/{source}@")):
            raise ValueError(f"{source}: its card names the file {file[:80]}, which is not its own")


def _walk(folder: Path, *, follow_links: bool) -> Iterator[os.DirEntry[str]]:
    """Yield everything in a folder and its folders; linked folders are entered if links are followed."""
    waiting, seen = [str(folder)], set[str]()
    while waiting:
        parent = waiting.pop()
        if (real := os.path.realpath(parent)) in seen:
            continue
        seen.add(real)
        with os.scandir(parent) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=follow_links):
                    waiting.append(entry.path)


def _named_files(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the files of a data set that name other files, with these names."""
    import yaml

    for file in (folder / name for name in CARDS):
        if file.is_file() and file.stat().st_size <= MAX_CARD_BYTES:
            text = file.read_text(encoding="utf-8", errors="replace")
            front = re.match(r"\A\s*---\s*\n(.*?)\n---", text, re.DOTALL)
            text = front[1] if front else "" if file.suffix == ".md" else text
            try:
                card = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"{file}: its head is not YAML") from error
            configs = card.get("configs") if isinstance(card, Mapping) else None
            yield file, [text for config in _as_list(configs) for text in _file_patterns(config)]
        elif file.is_file():
            raise ValueError(f"{file}: larger than {MAX_CARD_BYTES} bytes")
    for file in (folder / "dataset_dict.json", *folder.glob("state.json"), *folder.glob("*/state.json")):
        if file.is_file():
            try:
                state = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file}: not JSON") from error
            files = state.get("_data_files") if isinstance(state, Mapping) else None
            splits = state.get("splits") if isinstance(state, Mapping) else None
            names = [item.get("filename") for item in _as_list(files) if isinstance(item, Mapping)]
            yield file, [name for name in [*names, *_as_list(splits)] if isinstance(name, str)]


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _file_patterns(config: object) -> list[str]:
    """Return the patterns of files in a configuration of a card, however they are nested."""
    if not isinstance(config, Mapping):
        return []
    waiting: list[object] = [config.get("data_files"), config.get("data_dir")]
    patterns = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            patterns.append(value)
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, Mapping):
            waiting += [item for name, item in value.items() if name != "split"]
    return patterns


def _is_elsewhere(name: str) -> bool:
    """Return whether a name of a file leads out of the folder that it is looked for in, or is an address."""
    return os.path.isabs(name) or "::" in name or "://" in name or name[:1] == "~" or ".." in Path(name).parts


def is_within(path: str, folder: str) -> bool:
    """Return whether an absolute path is a folder, or lies in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
