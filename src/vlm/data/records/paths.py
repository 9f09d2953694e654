"""What a path of records names, as its name tells. Standard library only: configurations are checked with it."""

import re
from pathlib import Path

HUB_PATTERN = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""A data set on the Hub: `hf://owner/name` or `hf://owner/name@revision`."""
PIPE_PREFIX = "pipe:"
"""The prefix of a command whose output is a tar shard."""
TABLE_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
"""Suffix of a table -> the builder of `datasets` that opens it."""
RECORD_SUFFIXES = (".json", ".jsonl", *TABLE_BUILDERS, ".tar")


def is_tar_path(path: str) -> bool:
    """Return whether a path names tar shards, which are read in sequence."""
    return path.startswith(PIPE_PREFIX) or path.endswith(".tar") or any(Path(path).glob("*.tar"))


def path_problem(path: str) -> str | None:
    """Return why a path can name no records, or None where it can."""
    if path.startswith(PIPE_PREFIX) or HUB_PATTERN.fullmatch(path):
        return None
    if "://" in path:
        return "addresses are not fetched; hf://owner/name is a data set on the Hub"
    if Path(path).is_dir() or path.endswith(RECORD_SUFFIXES):
        return None
    names = ", *".join(RECORD_SUFFIXES)
    return f"a file named *{names}, a folder of a Hugging Face data set, or hf://owner/name is needed"
