"""The cache on disk: what is computed once from a file's content, and opened by every process after that.

Everything in it can be deleted at any time. Files are written under another name and renamed, under a lock, so that
ranks which start together wait for the one that works, and a run that is killed leaves nothing half done.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from huggingface_hub.constants import HF_HOME


def resolve_cache_folder(named: str | None) -> Path:
    """`dataset.cache_dir`, or `vlm` in the folder of Hugging Face's caches (`HF_HOME`)."""
    return Path(named) if named else Path(HF_HOME, "vlm")


def content_hash(path: Path, cache: Path) -> str:
    """SHA-256 of a file's content. Its path, size and modification time find one that was computed before."""
    facts = path.stat()
    seen = json_digest(str(path.resolve()), facts.st_size, facts.st_mtime_ns)
    stored = cache / "hashes" / seen
    if stored.is_file():
        return stored.read_text(encoding="ascii")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    stored.parent.mkdir(parents=True, exist_ok=True)
    partial = stored.with_name(f"{seen}.{os.getpid()}")
    partial.write_text(found, encoding="ascii")
    partial.replace(stored)
    return found


def create_once(path: Path, make: Callable[[Path], None]) -> Path:
    """A file of the cache, made by `make(a path to write to)` where it is missing.

    Of processes that ask at the same time, one makes it and the others wait.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                partial = path.with_name(f"{path.name}.partial")
                make(partial)
                partial.replace(path)
    return path


def json_digest(*values: object) -> str:
    """A name for anything that JSON can hold: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
