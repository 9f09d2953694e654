"""What a path of records names, told by its looks. Standard library only: configurations are checked with it."""

import re
from pathlib import Path

HUB = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""A data set on the Hub: `hf://owner/name` or `hf://owner/name@revision`."""
PIPE = "pipe:"
"""What stands before a command whose output is a tar shard."""
TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
"""Suffix of a table -> the builder of `datasets` that opens it."""
SUFFIXES = (".json", ".jsonl", *TABLES, ".tar")


def is_stream_only(path: str) -> bool:
    """Whether a path names tar shards, which are read one after the other."""
    return path.startswith(PIPE) or path.endswith(".tar") or (Path(path).is_dir() and any(Path(path).glob("*.tar")))


def kind_problem(path: str) -> str | None:
    """Why a path can name no records, or None where it can."""
    if path.startswith(PIPE) or HUB.fullmatch(path):
        return None
    if "://" in path:
        return "addresses are not fetched; hf://owner/name is a data set on the Hub"
    if Path(path).is_dir() or path.endswith(SUFFIXES):
        return None
    return f"a file named *{', *'.join(SUFFIXES)}, a folder of a Hugging Face data set, or hf://owner/name is needed"
