"""A table of URLs and captions, read row by row: what `vlm data download` fetches, and what was fetched before.

To read another kind of table, add its suffix to `KINDS`.
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
"""Columns that are known without being named, in lower case."""
TABLE_KINDS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ","},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},  # captions begin with quotation marks and never end them
    ".parquet": {},
}
"""Suffix of a table -> how the csv module reads it."""
FOLDER_SIZE = 10_000
"""Pictures in a subfolder."""
IDENTITY_BYTES = 2**20
"""Bytes of a table by which it is known again."""


@dataclass(frozen=True)
class Row:
    """A row of the table, counted from 0."""

    number: int
    url: str
    caption: str


class Table:
    """A file of URLs and captions, whatever its size: only a few rows are in memory.

    Args:
        path: the file.
        url_column: the name of the column, or its number from 1 where there is no header; None: found out.
        caption_column: the same.

    Attributes:
        num_rows: how many; of a text file its lines, which some rows may have more than one of.

    Raises:
        ValueError: it is no such file, or its columns cannot be told.
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
        lower = [name.lower() for name in names]
        known = [n for n, name in enumerate(lower) if name in URL_NAMES]
        urls = known if self._has_header else [n for n, cell in enumerate(first) if is_url(cell)]
        self._url_index = self._find_column("url", url_column, urls)
        others = [n for n in range(len(names)) if n != self._url_index]
        captions = [n for n in others if lower[n] in CAPTION_NAMES]
        self._caption_index = self._find_column("caption", caption_column, others if len(others) == 1 else captions)

    def _find_column(self, what: str, given: str | None, candidates: list[int]) -> int:
        """The column that was named, or the only one that looks like it."""
        known = ", ".join(self._column_names)
        if not self._has_header:
            shown = (f"{name} ({cell:.40})" for name, cell in zip(self._column_names, self._first_row, strict=True))
            known = f"no header, and in the first row {', '.join(shown)}"
        if given is not None:
            if given not in self._column_names:
                raise ValueError(f"--{what}-column={given!r}: no such column; {self.path} has {known or 'none'}")
            return self._column_names.index(given)
        if len(candidates) != 1:
            raise ValueError(
                f"which is the column of the {what}s? {self.path} has {known or 'none'} – name it: --{what}-column"
            )
        return candidates[0]

    def rows(self) -> Iterator[Row]:
        """All rows in order; what a row lacks is empty."""
        pairs = self._iter_parquet_pairs() if self._suffix == ".parquet" else self._iter_text_pairs()
        for number, (url, caption) in enumerate(pairs):
            yield Row(number, (url or "").strip(), (caption or "").strip())

    def identity(self) -> dict[str, Any]:
        """What tells this table, read this way, from another."""
        with self.path.open("rb") as file:
            beginning = hashlib.sha256(file.read(IDENTITY_BYTES)).hexdigest()
        columns = {
            "url_column": self._column_names[self._url_index],
            "caption_column": self._column_names[self._caption_index],
        }
        return {"size": self.path.stat().st_size, "sha256_of_beginning": beginning, **columns}

    def _iter_cells(self) -> Iterator[list[str]]:
        """The rows of a text file, the header too. Bytes that are no UTF-8 stay the trouble of their row."""
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
            raise ValueError(f"{self.path} is no Parquet file: {error}") from error

    def _iter_parquet_pairs(self) -> Iterator[tuple[Any, Any]]:
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
    """Whether it looks like one."""
    return cell.strip().lower().startswith(("http://", "https://"))
