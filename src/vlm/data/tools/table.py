"""A table of URLs and captions, read row by row, for `vlm data download` and for converting its result.

To read another kind of table, add its suffix to `TABLE_KINDS`.
"""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

URL_NAMES = frozenset({"url", "image_url", "image_link", "img_url", "link", "uri", "photo_image_url"})
CAPTION_NAMES = frozenset({"caption", "text", "title", "alt", "alt_text", "description", "sentence"})
"""Names of columns that are recognised, in lower case."""
TABLE_KINDS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ","},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},  # captions begin with quotation marks and never end them
    ".parquet": {},
}
"""Suffix of a table -> options of the csv module."""
MAX_CELL = 131_072
"""The maximum number of characters of a cell: a quotation mark that is never closed makes one of all that follows."""
FOLDER_SIZE = 10_000
"""Number of images in a subfolder."""
IDENTITY_BYTES = 2**20
"""The first bytes of a table, by which it is recognised."""


@dataclass(frozen=True)
class Row:
    """A row of the table; `number` is counted from 0, without the header."""

    number: int
    url: str
    caption: str


class Table:
    """A file of URLs and captions of any size: only a few rows are in memory.

    A column is given by its name, or its number from 1 if there is no header; by default it is recognised by its
    name or content. `num_rows` of a text file are its lines, of which a row may have several.

    Raises:
        ValueError: the file is not such a table, or its columns are not recognised.
    """

    def __init__(self, path: Path, url_column: str | None, caption_column: str | None):
        if path.suffix.lower() not in TABLE_KINDS:
            raise ValueError(f"{path} ends in {path.suffix!r}; a table is one of {', '.join(TABLE_KINDS)}")
        self.path = path
        self._suffix = path.suffix.lower()
        if self._suffix == ".parquet":
            with self._open_parquet() as file:
                names, first, self.num_rows = file.schema_arrow.names, [], file.metadata.num_rows
            self._has_header = True
        else:
            first = next(self._iter_cells(), [])
            self._has_header = not any(is_url(cell) for cell in first)
            names = [cell.strip() for cell in first] if self._has_header else [str(n + 1) for n in range(len(first))]
            with path.open("rb") as file:
                self.num_rows = sum(line.strip() != b"" for line in file) - self._has_header
        self._column_names, self._first_row = names, first
        known = [n for n, name in enumerate(names) if name.lower() in URL_NAMES]
        urls = known if self._has_header else [n for n, cell in enumerate(first) if is_url(cell)]
        self._url_index = self._find_column("url", url_column, urls)
        others = [n for n in range(len(names)) if n != self._url_index]
        captions = [n for n in others if names[n].lower() in CAPTION_NAMES]
        self._caption_index = self._find_column("caption", caption_column, others if len(others) == 1 else captions)

    def _find_column(self, kind: str, name: str | None, candidates: list[int]) -> int:
        """Return the index of the named column, or of the only candidate."""
        known = ", ".join(self._column_names)
        if not self._has_header:
            shown = (f"{number} ({cell:.40})" for number, cell in zip(self._column_names, self._first_row, strict=True))
            known = f"no header, and in the first row {', '.join(shown)}"
        if name is not None:
            if name not in self._column_names:
                raise ValueError(f"--{kind}-column={name!r}: no such column; {self.path} has {known or 'none'}")
            return self._column_names.index(name)
        if len(candidates) != 1:
            columns = f"{self.path} has {known or 'none'}"
            raise ValueError(f"which column holds the {kind}s? {columns}; name it with --{kind}-column")
        return candidates[0]

    def rows(self) -> Iterator[Row]:
        """Iterate over all rows in order; a missing cell is empty."""
        pairs = self._iter_parquet_pairs() if self._suffix == ".parquet" else self._iter_text_pairs()
        for number, (url, caption) in enumerate(pairs):
            yield Row(number, (url or "").strip(), (caption or "").strip())

    def identity(self) -> dict[str, int | str]:
        """Return what distinguishes this table, with these columns, from another."""
        with self.path.open("rb") as file:
            beginning = hashlib.sha256(file.read(IDENTITY_BYTES)).hexdigest()
        url, caption = (self._column_names[index] for index in (self._url_index, self._caption_index))
        size = self.path.stat().st_size
        return {"size": size, "sha256_of_beginning": beginning, "url_column": url, "caption_column": caption}

    def _iter_cells(self) -> Iterator[list[str]]:
        """Iterate over the rows of a text file, header included; bytes that are no UTF-8 spoil only their own row."""
        csv.field_size_limit(MAX_CELL)  # other tables, which hold images, may have raised it
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, **TABLE_KINDS[self._suffix])
            try:
                yield from filter(None, reader)
            except csv.Error as error:
                raise ValueError(f"{self.path}, line {reader.line_num}: {error}") from error

    def _iter_text_pairs(self) -> Iterator[tuple[str, str]]:
        for cells in islice(self._iter_cells(), int(self._has_header), None):
            url, caption = (cells[n] if n < len(cells) else "" for n in (self._url_index, self._caption_index))
            yield url, caption

    def _open_parquet(self) -> pyarrow.parquet.ParquetFile:
        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a Parquet file: {error}") from error

    def _iter_parquet_pairs(self) -> Iterator[tuple[str | None, str | None]]:
        names = [self._column_names[n] for n in (self._url_index, self._caption_index)]
        with self._open_parquet() as file:
            for name in names:
                kind = file.schema_arrow.field(name).type
                if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in (pa.string(), pa.large_string()):
                    raise ValueError(f"{self.path}: column {name!r} is of {kind}; it must be of strings")
            for group in range(file.num_row_groups):  # over all groups at once, memory grows with the file
                for batch in file.iter_batches(1024, row_groups=[group], columns=names):
                    yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def is_url(cell: str) -> bool:
    """Return whether a cell looks like a URL."""
    return cell.strip().lower().startswith(("http://", "https://"))
