"""JSON files, of lists or of lines, as Arrow files: indexed once, then opened by memory map, whatever their size.

A record is kept as the bytes of the file and parsed when it is needed, so that a broken record affects no other, and
records of one file may differ in their keys.
"""

import json
import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import pyarrow as pa

from vlm.data.cache import content_hash, create_once
from vlm.data.records.files import open_bytes, uncompressed_file
from vlm.data.records.layout import BYTE_ORDER_MARK, decode_members, find_layout
from vlm.data.records.paths import LINE_SUFFIXES, split_suffix
from vlm.data.records.text import WrittenFloat
from vlm.data.sample import BadSample

SCHEMA = pa.schema([("record", pa.large_binary())])
RECORDS_PER_BATCH = 4096
FORMAT_VERSION = 2
"""Increase it whenever the same file would be indexed as other records."""


class IndexedRecords:
    """The records of a JSON file (a list, or one record per line, see `layout`), parsed one by one.

    Attributes:
        fingerprint: of the file's content.

    Raises:
        ValueError: the file does not parse; tells where.
    """

    def __init__(self, path: Path, cache: Path):
        kind = "lines" if split_suffix(str(path))[0] in LINE_SUFFIXES else "list"
        name = f"{content_hash(path, cache)}.{kind}.{FORMAT_VERSION}.arrow"
        self._open(create_once(cache / "records" / name, lambda partial: write_index(path, partial)))

    def _open(self, file: Path) -> None:
        self._file, self.fingerprint = file, file.name.partition(".")[0]
        self._column: pa.ChunkedArray = pa.ipc.open_file(pa.memory_map(str(file))).read_all().column("record")

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._column)

    def __getitem__(self, index: int) -> object:  # any value of JSON
        """Return a record.

        Raises:
            BadSample: its bytes are not JSON.
        """
        return parse_record(self._column[index].as_buffer().to_pybytes())

    def iter_bytes(self) -> Iterator[memoryview]:
        """Iterate over the bytes of all records, which are not copied."""
        for chunk in self._column.chunks:
            _, offsets, content = chunk.buffers()
            bounds = np.frombuffer(offsets, np.int64, len(chunk) + 1, chunk.offset * 8).tolist()
            view = memoryview(content)
            yield from (view[start:end] for start, end in pairwise(bounds))

    def __getstate__(self) -> Path:
        """Return the path of the index, which another process maps itself."""
        return self._file

    def __setstate__(self, file: Path) -> None:
        """Map the file again, in another process."""
        self._open(file)


def write_index(source: Path, target: Path) -> None:
    """Write the records of a JSON file as an Arrow file with one column of bytes.

    Raises:
        ValueError: the file holds no list of records.
    """
    layout = find_layout(source)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer, ExitStack() as stack:
        if layout.lines:
            records = iter_lines(stack.enter_context(open_bytes(source)))
        else:
            plain = stack.enter_context(uncompressed_file(source))
            records = _iter_list_items(plain, source, layout.key)
        while batch := list(islice(records, RECORDS_PER_BATCH)):
            writer.write_batch(pa.record_batch([_to_binary_column(batch)], schema=SCHEMA))


def _to_binary_column(records: Sequence[bytes | memoryview]) -> pa.Array:
    """Make an Arrow column of bytes; `pa.array` would import pandas to check whether they are a pandas series."""
    offsets = np.zeros(len(records) + 1, dtype=np.int64)
    np.cumsum([len(record) for record in records], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(records))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(records), buffers)


def read_lines(file: Path, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """Iterate over the lines of a file that are not empty, each with the byte after it.

    Args:
        file: the file; of one that is compressed, bytes are those of its content, which is decompressed from the start.
        start: the byte to begin at.
    """
    with open_bytes(file) as opened:
        if start:
            opened.seek(start)
        elif opened.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            start = len(BYTE_ORDER_MARK)
        else:
            opened.seek(0)
        for line in opened:
            start += len(line)
            if stripped := line.strip():
                yield stripped, start


def iter_lines(file: BinaryIO) -> Iterator[bytes]:
    """Iterate over the lines of a file that are not empty."""
    if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
        file.seek(0)
    return filter(None, map(bytes.strip, file))


def _iter_list_items(file: Path, source: Path, key: str | None) -> Iterator[memoryview | bytes]:
    """Iterate over the items of a JSON list as bytes of a file, which is mapped and not read; messages name `source`.

    The list is the member `key` of the file's object, or the file itself where that is None.
    """
    if key is not None:
        for item in msgspec.json.decode(memoryview(decode_members(file)[key]), type=list[msgspec.Raw]):
            yield memoryview(item)
        return
    with file.open("rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    start = len(BYTE_ORDER_MARK) if content[:3] == BYTE_ORDER_MARK else 0
    try:
        items = msgspec.json.decode(memoryview(content)[start:], type=list[msgspec.Raw])
    except msgspec.ValidationError as error:
        kind = str(error).rpartition("got ")[2]
        raise ValueError(f"{source}: a list of records is needed, or one record on each line, got {kind}") from None
    except msgspec.DecodeError:
        yield from _iter_lenient_list_items(content[start:], source)
        return
    content.madvise(mmap.MADV_DONTNEED)
    for item in items:
        yield memoryview(item)


def _iter_lenient_list_items(content: bytes, source: Path) -> Iterator[bytes]:
    """Iterate over the items of a list that only Python's own parser accepts, such as one with NaN; slow, in memory.

    Raises:
        ValueError: Python's parser refuses it too; tells where.
    """
    text = content.decode("utf-8", "surrogateescape")
    decoder = json.JSONDecoder()

    def skip_whitespace(place: int) -> int:
        """Return the next place without white space."""
        return next((i for i in range(place, len(text)) if text[i] not in " \t\r\n"), len(text))

    begin = skip_whitespace(0)
    place = skip_whitespace(begin + 1)
    try:
        if text[begin : begin + 1] != "[":
            raise json.JSONDecodeError("Expecting '['", text, begin)
        while text[place : place + 1] != "]":
            _, end = decoder.raw_decode(text, place)
            yield text[place:end].encode("utf-8", "surrogateescape")
            place = skip_whitespace(end)
            if text[place : place + 1] == ",":
                place = skip_whitespace(place + 1)
                if text[place : place + 1] == "]":
                    raise json.JSONDecodeError("Illegal trailing comma", text, place)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        if (place := skip_whitespace(place + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, place)
    except json.JSONDecodeError as error:
        needed = "a list of records is needed, or one record on each line"
        raise ValueError(f"{source}: not JSON ({error}); {needed}") from None


FAST_DECODER = msgspec.json.Decoder(float_hook=WrittenFloat)
RECORD_DECODER = json.JSONDecoder(parse_float=WrittenFloat)
"""Both read records; numbers as texts of turns stay as they are written."""


def parse_record(line: bytes, sample_id: str = "?") -> object:  # any value of JSON
    """Parse a record.

    Raises:
        BadSample: its bytes are not JSON.
    """
    with suppress(ValueError, RecursionError):  # three times as fast as Python's, and refuses more, such as NaN
        return FAST_DECODER.decode(line)
    try:
        return RECORD_DECODER.decode(line.decode(json.detect_encoding(line), "surrogatepass"))
    except UnicodeDecodeError as error:
        raise BadSample(sample_id, f"not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits and thousands of brackets too
        raise BadSample(sample_id, f"not JSON: {error}") from None
