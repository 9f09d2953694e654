"""The cache on disk: files that are computed once from another file's content, and opened by every process after that.

All of it can be deleted at any time. Files are written under another name and renamed, under a lock, so that ranks
which start together wait for the one that writes, and a run that is killed leaves nothing half done.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from huggingface_hub.constants import HF_HOME


def resolve_cache_folder(cache_dir: str | None) -> Path:
    """Return `dataset.cache_dir`, or `vlm` in the folder of Hugging Face's caches (`HF_HOME`)."""
    return Path(cache_dir) if cache_dir else Path(HF_HOME, "vlm")


def content_hash(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file's content, from the cache where its path, size and modification time are known."""

    def write_hash(partial: Path) -> None:
        """Write the hash of the file's content."""
        with path.open("rb") as file:
            partial.write_text(hashlib.file_digest(file, "sha256").hexdigest(), encoding="ascii")

    status = path.stat()
    name = json_digest(str(path.resolve()), status.st_size, status.st_mtime_ns)
    return create_once(cache / "hashes" / name, write_hash).read_text(encoding="ascii")


def create_once(path: Path, make: Callable[[Path], None]) -> Path:
    """Return the path of a file in the cache, after `make(a path to write to)` has made it where it is missing.

    Of processes that call this at the same time, one makes the file and the others wait.
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
    """Return a fingerprint of anything that JSON can hold: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
