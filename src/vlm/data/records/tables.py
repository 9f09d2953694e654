"""CSV and TSV files as Arrow files of texts: written once, then opened by memory map.

A cell is the text that the file has, whatever it looks like (`None`, `NA`, `007`, `2.50`, `True`); only an empty cell
is missing. What such a file does not tell for certain (encoding, separator, whether quotation marks belong to the text)
is assumed if every row agrees with it; otherwise the file is refused, naming the line that does not.
"""

import csv
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm.data.cache import content_hash, create_once
from vlm.data.records.files import open_bytes, open_text
from vlm.data.records.paths import split_suffix
from vlm.data.sample import Record

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Suffix of a table -> the separator that is expected between its cells."""
SEPARATOR_NAMES = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a vertical bar"}
SAMPLED_LINES = 50
"""Number of lines that a separator has to fit before the whole file is checked with it."""
ROWS_PER_CHUNK = 64
"""Number of rows that are parsed at a time."""
ROWS_PER_BATCH = 4096
CHARACTERS_PER_BATCH = 32 << 20
"""The most rows, and about the most characters, of a batch of the Arrow file."""
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
FORMAT_VERSION = 1
"""Increase it whenever the same table would be written as another Arrow file, or read in another dialect."""


Rows = list[list[str]]


@dataclass(frozen=True)
class Dialect:
    """How a table is written.

    Attributes:
        encoding: as Python calls it.
        separator: the character between cells.
        is_quoted: whether quotation marks around a cell are removed.
        num_skipped: lines before the header.
    """

    encoding: str
    separator: str
    is_quoted: bool = True
    num_skipped: int = 0


class TableError(ValueError):
    """A line that does not fit the dialect that a table is read in."""


class TableRecords:
    """The rows of a CSV or TSV file, by index: texts by the names of their columns, None for an empty cell.

    Attributes:
        fingerprint: of the file's content.

    Raises:
        ValueError: the file is not such a table; the message names the line and says what to do.
    """

    def __init__(self, path: Path, cache: Path):
        self._open(create_once(_cache_file(path, cache, "arrow"), lambda partial: write_table(path, partial)))

    def _open(self, file: Path) -> None:
        self._file, self.fingerprint = file, file.name.partition(".")[0]
        self._table: pa.Table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        """Return a row as a record; raise IndexError if there is none."""
        return self._table.slice(range(len(self))[index], 1).to_pylist()[0]

    def __getstate__(self) -> Path:
        """Return the path of the table, which another process maps itself."""
        return self._file

    def __setstate__(self, file: Path) -> None:
        """Map the file again, in another process."""
        self._open(file)


def stream_table(path: Path, cache: Path) -> Iterator[Record]:
    """Iterate over the rows of a CSV or TSV file, as `TableRecords` has them, without a copy of it in the cache.

    Raises:
        ValueError: as `TableRecords`; before the first row.
    """
    chunks = _iter_chunks(path, read_dialect(path, cache))
    names = next(chunks)[0]
    for row in chain.from_iterable(chunks):
        yield {name: cell or None for name, cell in zip(names, row, strict=True)}


def _cache_file(path: Path, cache: Path, kind: str) -> Path:
    suffix = split_suffix(str(path))[0].removeprefix(".")
    return cache / "records" / f"{content_hash(path, cache)}.{suffix}.{FORMAT_VERSION}.{kind}"


def read_dialect(path: Path, cache: Path) -> Dialect:
    """Return the dialect that every row of a table agrees with, found once.

    Raises:
        ValueError: there is none; tells the line, and what to do.
    """

    def write(partial: Path) -> None:
        """Find out the dialect and write it as JSON."""
        dialect = try_dialects(path, lambda chunks: deque(chunks, maxlen=0))
        partial.write_text(json.dumps(asdict(dialect)), encoding="ascii")

    file = create_once(_cache_file(path, cache, "json"), write)
    return Dialect(**json.loads(file.read_text(encoding="ascii")))


def try_dialects(path: Path, use: Callable[[Iterator[Rows]], object]) -> Dialect:
    """Call a function with the chunks of a table, see `_iter_chunks`; return the dialect that every row agrees with.

    If a row does not agree with the dialect, the function is called again from the start with another one.

    Raises:
        ValueError: as `read_dialect`.
    """
    guessed = guess_dialect(path)
    attempts = [(guessed, guessed.separator == "\t"), (replace(guessed, is_quoted=False), True), (guessed, False)]
    problem = None
    for dialect, refuses_joined_rows in attempts:
        try:
            use(_iter_chunks(path, dialect, refuses_joined_rows=refuses_joined_rows))
        except TableError as error:
            problem = problem or error
        else:
            return dialect
    raise ValueError(f"{path}, {problem}")


def guess_dialect(path: Path) -> Dialect:
    """Return the dialect that the first lines of a table agree with.

    Raises:
        ValueError: its encoding is not known, or several separators fit.
    """
    with open_bytes(path) as file:
        head = file.read(4096)
    marks = (encoding for mark, encoding in BYTE_ORDER_MARKS.items() if head.startswith(mark))
    encoding = next(marks, "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in head:
        raise ValueError(
            f"{path}: not UTF-8 (it has zero bytes): if it is UTF-16: iconv -f UTF-16LE -t UTF-8 {path} > NEW"
        )
    suffix, _ = split_suffix(str(path))
    with open_text(path, encoding) as file:
        try:
            lines = list(islice(file, SAMPLED_LINES))
        except UnicodeError as error:
            raise ValueError(describe_encoding(path, error)) from None
    if lines and (declared := re.fullmatch(r"sep=(.)\r?\n?", lines[0])):  # as Excel writes and reads it
        return Dialect(encoding, declared[1], num_skipped=1)
    fitting = [separator for separator in SEPARATOR_NAMES if _fits(lines, separator)]
    own = SEPARATORS[suffix]
    if "\t" in fitting or not fitting:
        separator = "\t" if fitting else own
    elif own in fitting:
        separator = own
    elif len(fitting) == 1:
        separator = fitting[0]
    else:
        names = " and ".join(SEPARATOR_NAMES[separator] for separator in fitting)
        raise ValueError(f"{path}: its cells may be separated by {names}; write it with {SEPARATOR_NAMES[own]}")
    return Dialect(encoding, separator)


def _fits(lines: Sequence[str], separator: str) -> bool:
    """Return whether a separator gives all rows of some lines the same number of cells, more than one."""
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        csv.field_size_limit(sys.maxsize)
        rows = [row for row in csv.reader(lines, delimiter=separator, quoting=quoting) if row]
        whole = rows[: -1 if len(lines) == SAMPLED_LINES else None]  # the last one may continue
        if whole and len(whole[0]) > 1 and {len(row) for row in whole} == {len(whole[0])}:
            return True
    return False


def _iter_chunks(path: Path, dialect: Dialect, *, refuses_joined_rows: bool = False) -> Iterator[Rows]:
    """Iterate over the names of a table's columns, as a row of its own, then its rows, some at a time.

    Args:
        path: the file.
        dialect: how it is written.
        refuses_joined_rows: whether a cell of several lines is an error where each of these is a whole row by itself:
            a quotation mark that begins a text and never ends it joins rows up to the next such text.

    Raises:
        TableError: a line does not fit the dialect.
        ValueError: the encoding is another, or the header names a column twice.
    """
    csv.field_size_limit(sys.maxsize)  # a cell may hold an image
    quoting = csv.QUOTE_MINIMAL if dialect.is_quoted else csv.QUOTE_NONE
    with open_text(path, dialect.encoding) as file:
        lines = islice(file, dialect.num_skipped, None)
        reader = csv.reader(lines, delimiter=dialect.separator, quoting=quoting, strict=True)
        try:
            header = next(filter(None, reader), None)
            if header is None:
                raise ValueError(f"{path}: the table has no rows")
            names = _name_columns(path, header)
            yield [names]
            line = reader.line_num
            while chunk := list(islice(reader, ROWS_PER_CHUNK)):
                first, has_long_rows = line + dialect.num_skipped + 1, reader.line_num - line > len(chunk)
                rows = _check_rows(chunk, names, dialect, first, has_long_rows=has_long_rows)
                if refuses_joined_rows and has_long_rows:
                    _check_not_joined(rows, dialect, first)
                line = reader.line_num
                yield rows
        except csv.Error as error:
            raise TableError(
                f"line {reader.line_num + dialect.num_skipped}: {error}. If a text begins with a quotation mark, "
                "enclose it in quotation marks and double its own"
            ) from None
        except UnicodeError as error:
            raise ValueError(describe_encoding(path, error)) from None


def _check_rows(chunk: Rows, names: Sequence[str], dialect: Dialect, first: int, *, has_long_rows: bool) -> Rows:
    """Return the rows that are not empty of those from a line on, some of which may have several lines.

    Raises:
        TableError: one has more or fewer cells than there are columns, or a quotation mark in a strange place.
    """
    rows = list(filter(None, chunk))
    if set(map(len, rows)) - {len(names)}:
        number, row = next((number, row) for number, row in enumerate(chunk) if row and len(row) != len(names))
        place = f"line {first} or later" if has_long_rows else f"line {first + number}"
        raise TableError(f"{place}: {_describe_ragged_row(row, names, dialect)}")
    if not dialect.is_quoted and dialect.separator != "\t" and any(map(_is_enclosed, chain.from_iterable(rows))):
        raise TableError(f"line {first} or later: only some quotation marks around cells are closed")
    return rows


def _check_not_joined(rows: Rows, dialect: Dialect, first: int) -> None:
    """Raise TableError if a row of several lines could as well be several rows."""
    for row in rows:
        lines = dialect.separator.join(row).splitlines()
        if len(lines) > 1 < len(row) and all(text.count(dialect.separator) == len(row) - 1 for text in lines):
            raise TableError(f"line {first} or later: a quotation mark joins several rows into one")


def _is_enclosed(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _name_columns(path: Path, header: Sequence[str]) -> list[str]:
    """Return the names of the columns; those without a name get a number."""
    names = [name.strip() or f"column {number}" for number, name in enumerate(header, start=1)]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise ValueError(f"{path}: the first line must name the columns, but names {twice[0]!r:.60} twice")
    return names


def _describe_ragged_row(row: Sequence[str], names: Sequence[str], dialect: Dialect) -> str:
    separator = SEPARATOR_NAMES.get(dialect.separator, repr(dialect.separator))
    return (
        f"{len(row)} cell(s), but the header has {len(names)} ({', '.join(names):.80}), with {separator} between them. "
        f"A text with {separator} or a line break in it must be enclosed in quotation marks"
    )


def write_table(source: Path, target: Path) -> None:
    """Write a CSV or TSV file as an Arrow file with a column of texts for each of its columns.

    Raises:
        ValueError: as `TableRecords`.
    """

    def write(chunks: Iterator[Rows]) -> None:
        """Write the rows as an Arrow file, batch by batch."""
        schema = pa.schema([(name, pa.large_string()) for name in next(chunks)[0]])
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            batch: Rows = []
            num_characters = 0
            for rows in chunks:
                batch += rows
                num_characters += sum(map(len, chain.from_iterable(rows)))
                if len(batch) >= ROWS_PER_BATCH or num_characters > CHARACTERS_PER_BATCH:
                    writer.write_batch(_make_batch(batch, schema))
                    batch, num_characters = [], 0
            if batch:
                writer.write_batch(_make_batch(batch, schema))

    try_dialects(source, write)


def _make_batch(rows: Rows, schema: pa.Schema) -> pa.RecordBatch:
    """Make a batch, with nulls for empty cells; `pa.array` would import pandas."""
    columns = [_to_text_column(list(map(str.encode, column))) for column in zip(*rows, strict=True)]
    return pa.record_batch(columns, schema=schema)


def _to_text_column(cells: Sequence[bytes]) -> pa.Array:
    lengths = np.fromiter(map(len, cells), np.int64, len(cells))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    present = np.packbits(lengths > 0, bitorder="little")
    buffers = [pa.py_buffer(present), pa.py_buffer(offsets), pa.py_buffer(b"".join(cells))]
    return pa.Array.from_buffers(pa.large_string(), len(cells), buffers)


def describe_encoding(path: Path, error: UnicodeError) -> str:
    """Return the message for a file that is not in the encoding that it was taken to be in."""
    detail = ""
    if isinstance(error, UnicodeDecodeError) and error.start < len(error.object):
        around = bytes(error.object[max(error.start - 20, 0) : error.start + 20])
        western = around.decode("cp1252", "replace")
        detail = f"; if {western!r} is the right text, the file is in Windows-1252 (Latin-1)"
    return (
        f"{path}: not UTF-8{detail}: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW converts it; name another encoding "
        "if it has one"
    )
