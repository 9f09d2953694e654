"""Opens files of records as bytes or text, decompressing `.gz`, and refuses files that hold something else.

Imports only the standard library and siblings that do the same.
"""

import gzip
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, cast

from vlm.data.file_kinds import NUM_HEAD_BYTES, describe_bytes
from vlm.data.records.paths import JSON_SUFFIXES, TABLE_BUILDERS, TEXT_TABLE_SUFFIXES, split_suffix

MAX_COMPRESSION, MIN_UNCOMPRESSED_LIMIT = 200, 1 << 30
"""How many times larger than its file a decompressed one may be, and the bytes that any may have: repeated text
compresses to a fiftieth, zeros to a thousandth."""

BINARY_TABLES = ("Parquet", "an Arrow file")
"""What `describe_bytes` says of tables that are not text."""


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; decompress it if its name ends in `.gz`.

    Raises:
        ValueError: the file does not decompress; raised within the `with` statement.
    """
    if not split_suffix(str(path))[1]:
        with path.open("rb") as file:
            yield file
        return
    try:
        with gzip.open(path) as compressed:
            yield cast(BinaryIO, compressed)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: does not decompress: {error}") from None


@contextmanager
def open_text(path: Path, encoding: str) -> Iterator[TextIOWrapper]:
    """Open a file for reading as text, with its line breaks as they are; errors as in `open_bytes`."""
    with open_bytes(path) as file, TextIOWrapper(file, encoding=encoding, newline="") as text:
        yield text


@contextmanager
def uncompressed_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file; of a compressed file, that of a decompressed copy, which is removed at the end."""
    if not split_suffix(str(path))[1]:
        yield path
        return
    limit = max(MIN_UNCOMPRESSED_LIMIT, MAX_COMPRESSION * path.stat().st_size)
    with tempfile.NamedTemporaryFile() as target:
        with open_bytes(path) as source:
            while chunk := source.read(1 << 20):
                if target.tell() + len(chunk) > limit:
                    raise ValueError(
                        f"{path}: it decompresses to more than {MAX_COMPRESSION} times its size, as records do not; "
                        "if it is what it should be, gunzip it first"
                    )
                target.write(chunk)
        target.flush()
        yield Path(target.name)


def check_is_records(path: Path) -> None:
    """Raise ValueError if a file of records is empty, or by its first bytes something else (an LFS pointer)."""
    suffix, is_compressed = split_suffix(str(path))
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    if suffix not in (*JSON_SUFFIXES, *TEXT_TABLE_SUFFIXES, *TABLE_BUILDERS):
        return
    with path.open("rb") as file:
        head = file.read(NUM_HEAD_BYTES)
    if is_compressed and head.startswith(b"\x1f\x8b"):
        with open_bytes(path) as file:
            head = file.read(NUM_HEAD_BYTES)
    kind = describe_bytes(head)
    if suffix in TABLE_BUILDERS:
        is_as_named = kind is None or kind.startswith(BINARY_TABLES)
    else:
        is_markup = head.lstrip()[:1] == b"<" and (suffix in JSON_SUFFIXES or "a web page" in str(kind))
        is_text = kind is None or (kind.startswith(("it is text", "it has nothing")) and not is_markup)
        is_as_named = is_text or (suffix in TEXT_TABLE_SUFFIXES and kind.startswith("text in"))  # `tables` reads those
    if not is_as_named:
        raise ValueError(f"{path}: {kind}" if kind.startswith(("it ", "the ", "nothing")) else f"{path}: it is {kind}")
