"""Tells what kind of records a path names. Standard library only, since configurations are checked with it."""

import re
from pathlib import Path

from vlm.data.file_kinds import describe_bytes, read_head

HUB_PATTERN = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""A data set on the Hub: `hf://owner/name` or `hf://owner/name@revision`."""
PIPE_PREFIX = "pipe:"
"""The prefix of a command whose output is a tar shard."""
LINE_SUFFIXES = (".jsonl", ".ndjson")
"""Suffixes of files with one record per line."""
JSON_SUFFIXES = (".json", *LINE_SUFFIXES)
TEXT_TABLE_SUFFIXES = (".csv", ".tsv")
TABLE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
"""Suffix of a table -> the builder of `datasets` that opens it."""
RECORD_SUFFIXES = (*JSON_SUFFIXES, *TEXT_TABLE_SUFFIXES, *TABLE_BUILDERS, ".tar")
COMPRESSED_SUFFIXES = (*JSON_SUFFIXES, *TEXT_TABLE_SUFFIXES)
"""Suffixes of files that may be compressed, followed by `.gz`."""


def split_suffix(path: str) -> tuple[str, bool]:
    """Return the suffix of a file's name in lower case, and whether it is compressed (`.gz` after the suffix)."""
    name = Path(path).name.lower()
    is_compressed = name.endswith(".gz")
    return Path(name.removesuffix(".gz")).suffix, is_compressed


def names_records(path: str) -> bool:
    """Return whether a file's name is that of a file of records."""
    suffix, is_compressed = split_suffix(path)
    return suffix in (COMPRESSED_SUFFIXES if is_compressed else RECORD_SUFFIXES)


def is_tar_path(path: str) -> bool:
    """Return whether a path names tar shards, which are read in sequence."""
    if path.startswith(PIPE_PREFIX) or _is_tar_address(path):
        return True
    return not is_address(path) and (path.endswith(".tar") or _has_tar_files(path))


def _is_tar_address(path: str) -> bool:
    """Return whether a path is the address of a tar file, after which parameters may follow."""
    return path.startswith(("http://", "https://")) and path.partition("?")[0].endswith(".tar") and "::" not in path


def _has_tar_files(path: str) -> bool:
    return any(Path(path).glob("*.tar"))


def is_address(path: str) -> bool:
    """Return whether libraries would take a path for an address, or for one in another (`zip://a::https://b`)."""
    return "://" in path or "::" in path


def path_problem(path: str) -> str | None:
    """Return why a path cannot name records; None if it can."""
    if path.startswith(PIPE_PREFIX) or HUB_PATTERN.fullmatch(path):
        return None
    if _is_tar_address(path):
        return None
    if is_address(path):
        return "the only web addresses that are read are http(s)://….tar; hf://owner/name is a data set on the Hub"
    if Path(path).is_dir() or names_records(path):
        return None
    names = ", *".join(RECORD_SUFFIXES)
    needed = f"file named *{names}, a folder of a Hugging Face data set, or hf://owner/name is needed"
    kind = _describe_file(path)
    return f"a {needed}" if kind is None else f"{kind}. A {needed}"


def _describe_file(path: str) -> str | None:
    """Say what a file is by its first bytes; None if it is text or not known, or where there is no such file."""
    try:
        kind = describe_bytes(read_head(Path(path)))
    except OSError:
        return None
    if kind is None or kind.startswith("it is text"):
        return None
    return kind if kind.startswith(("it ", "the ", "nothing")) else f"it is {kind}"
