"""Reads tar shards in sequence, starting at any sample; files with the same name are one sample.

The `.json` is the record, the `.txt` its `caption`; images are bytes under `image` (several under `images`). The name
is the `id` of a record without one.
"""

import re
import tarfile
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Self

from vlm.data.records.http import HTTP_PREFIXES, open_http
from vlm.data.records.index import parse_record
from vlm.data.records.links import list_shards
from vlm.data.records.paths import PIPE_PREFIX
from vlm.data.records.positions import END
from vlm.data.sample import BadSample, Record

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Extensions of image files in a tar shard."""
META_NAMES = re.compile(r"__[^/]*__($|/)")
"""Names of members that webdataset passes over."""
Shard = Path | str
"""A file as a path; an address or a command as text."""
MAX_SHARDS = 1_000_000
MAX_SAMPLE_BYTES = 1 << 30
"""The maximum number of bytes that the files of a sample have, which are held in memory, with their entries in the
shard."""
MAX_EXTENSION_BYTES = 1 << 20
"""The maximum number of bytes of a long name, or of further fields, of a file in a shard."""
EXTENSION_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
COMPRESSIONS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
"""How compressed files begin."""


def expand_shards(path: str, *, allow_pipe: bool = False, follow_links: bool = False) -> list[Shard]:
    """Return the shards that a path with braces, a folder, an address or a command stands for.

    Only what the user wrote can be an address or a command; everything in a folder is a file, whatever its name.

    Raises:
        ValueError: a shard does not exist (addresses are not asked), a command is not allowed, or a link leads out of
            the folder.
    """
    if path.startswith(PIPE_PREFIX):
        if not allow_pipe:
            raise ValueError(f"{path}: this is a shell command; dataset.allow_pipe=true allows it to run")
        return [*_expand_braces(path)]
    if path.startswith(HTTP_PREFIXES):
        return [*_expand_braces(path)]
    is_folder = Path(path).is_dir()
    files = list_shards(Path(path), follow_links=follow_links) if is_folder else [*map(Path, _expand_braces(path))]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{path}: there is no file {missing[0]}")
    return [*files]


def _expand_braces(path: str) -> list[str]:
    """Return the names that a path with braces stands for; raise ValueError if there are too many."""
    from braceexpand import braceexpand

    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", path)  # looked at first: the library holds a whole range in memory
    number = prod(abs(int(end) - int(start)) + 1 for start, end in ranges)
    names = [] if number > MAX_SHARDS else list(islice(braceexpand(path), MAX_SHARDS + 1))
    if max(number, len(names)) > MAX_SHARDS:
        raise ValueError(f"{path}: it stands for more than {MAX_SHARDS:,} shards")
    return names


def read_tar(url: Shard, start: int = 0) -> Iterator[tuple[Record | BadSample, int]]:
    """Iterate over the samples of a shard, as files by suffix, each with the byte after it.

    If the rest cannot be read, the last item is a `BadSample` with the place `END`.

    Args:
        url: a file as a path; an address (`http:`, `https:`) or a command (`pipe:`) as text.
        start: the byte after the last sample that was read. Files and addresses are read from there on; the output of
            a command, or of a compressed file, is read from its beginning and passed over.
    """
    from webdataset.tariterators import group_by_keys

    try:
        stream, base = open_shard(url, start)
        with closing(stream):
            for sample in group_by_keys(_iter_files(stream, base, url)):
                files = {name: value for name, value in sample.items() if isinstance(value, tuple)}
                end = max(end for _, end in files.values())
                if end > start:
                    yield {"__key__": sample["__key__"], **{name: content for name, (content, _) in files.items()}}, end
    except (tarfile.TarError, OSError, ValueError) as error:  # a torn shard, a command that fails
        yield BadSample("?", f"{url} stopped: {error.args[0] if error.args else error}", str(url)), END


def open_shard(url: Shard, start: int) -> tuple[Any, int]:
    """Open a shard; return it with its first byte, which is `start` or, where nothing can be passed over, 0."""
    from webdataset.gopen import gopen

    if isinstance(url, str) and url.startswith(HTTP_PREFIXES):
        return open_http(url, start), start
    if isinstance(url, str) and url.startswith(PIPE_PREFIX):
        return gopen(url), 0
    file = open(url, "rb")  # noqa: SIM115 - `read_tar` closes it
    is_compressed = file.read(6).startswith(COMPRESSIONS)
    base = 0 if is_compressed else start
    file.seek(base)
    return file, base


class _Member(tarfile.TarInfo):
    """A file in a shard. `tarfile` reads all of an extension into memory, also one that was compressed to nothing."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the member of an entry; raise ReadError if it is an extension that is too long."""
        member = super().frombuf(buf, encoding, errors)
        if member.type in EXTENSION_TYPES and member.size > MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"the name or fields of a file have {member.size:,} bytes")
        return member


def _iter_files(stream: Any, base: int, url: Shard) -> Iterator[dict[str, Any]]:
    """Iterate over the files of a tar stream, as `group_by_keys` takes them: each content with the byte after it."""
    from webdataset.tariterators import base_plus_ext

    if base and not stream.peek(1):  # nothing is left, which would be no tar file
        return
    key, num_bytes = None, 0
    with tarfile.open(fileobj=stream, mode="r|" if base else "r|*", tarinfo=_Member) as tar:
        for member in tar:
            name = member.name
            is_meta = ("/" not in name and name.startswith("__") and name.endswith("__")) or META_NAMES.match(name)
            if member.isreg() and not is_meta:
                earlier_key, key = key, base_plus_ext(name)[0] or key  # a file without a suffix is no sample's
                num_bytes = (num_bytes if key == earlier_key else 0) + tarfile.BLOCKSIZE + member.size
                if num_bytes > MAX_SAMPLE_BYTES:  # also of files that are all holes, or were compressed to nothing
                    raise ValueError(f"the files of {key or name} have more than {MAX_SAMPLE_BYTES:,} bytes")
                opened = tar.extractfile(member)
                assert opened is not None
                content = opened.read()
                blocks = -(-member.size // tarfile.BLOCKSIZE)
                end = base + member.offset_data + blocks * tarfile.BLOCKSIZE
                yield {"fname": name, "data": (content, end), "__url__": str(url)}
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - it would keep all of them


def make_tar_record(sample: Record) -> Record:
    """Return the record that the files of a sample make up.

    Raises:
        BadSample: its `.json` holds no record.
    """
    name = sample["__key__"]
    record = parse_record(sample["json"], name) if "json" in sample else {}
    if not isinstance(record, dict):
        raise BadSample(name, f"its .json must hold a mapping, got {type(record).__name__}")
    if "txt" in sample:
        record["caption"] = sample["txt"].decode(errors="replace")
    files = {key: value for key, value in sample.items() if key.rpartition(".")[2].lower() in IMAGE_EXTENSIONS}
    images = [{"bytes": files[key], "path": f"{name}.{key}"} for key in sorted(files, key=_natural_sort_key)]
    if images:
        record = {key: value for key, value in record.items() if key not in ("image", "images")}
        if len(images) > 1:
            record["images"] = images
        else:
            record["image"] = images[0]
    return {"id": name, **record}


def _natural_sort_key(key: str) -> list[tuple[int, str]]:
    """Return a key that sorts `10.png` after `9.png`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", key)]
