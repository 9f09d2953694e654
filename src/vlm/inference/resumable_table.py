"""A table with a row for each record, written row by row and resumed where it was stopped.

Rows go to `OUTPUT.partial` in the order in which they are made, each with the number of its record, and to OUTPUT in
the order of the records once all are there. `OUTPUT.partial.json` holds a fingerprint: only the same run resumes it.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SUFFIXES = (".csv", ".jsonl")
"""Allowed suffixes of an output."""


def check_output(output: Path, *, overwrite: bool, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raise ValueError where a table cannot be written to a path, or would replace a file."""
    if output.suffix not in suffixes:
        raise ValueError(f"--output {output}: it must end in {' or '.join(suffixes)}")
    place = next(parent for parent in output.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--output {output}: {place} is not a folder that can be written to")
    if output.is_dir():
        raise ValueError(f"--output {output}: this is a folder")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; choose another --output, or add --overwrite")


class ResumableTable:
    """A table that gets its name once it is complete; until then it is a file of JSON lines.

    `columns` are those of a `.csv`; JSON lines have every key of a row. The fingerprint is of all that rows depend on.
    """

    def __init__(self, path: Path, columns: Sequence[str], fingerprint: str):
        self.path, self.columns, self.fingerprint = path, columns, fingerprint
        self.partial = path.with_name(f"{path.name}.partial")
        self.metadata = path.with_name(f"{path.name}.partial.json")

    def begin_or_resume(self, *, overwrite: bool) -> set[int]:
        """Return the numbers of the records that an interrupted run has written; a torn last row is cut off.

        Raises:
            ValueError: the table was begun with another fingerprint.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"fingerprint": self.fingerprint, "rows": "with numbers"}
        if not (self.partial.exists() and self.metadata.exists()) or overwrite:
            self.partial.write_bytes(b"")  # first: no rows may stand beside another fingerprint
            self.metadata.write_text(json.dumps(metadata) + "\n", encoding="utf-8")
            return set()
        if json.loads(self.metadata.read_text(encoding="utf-8")) != metadata:
            raise ValueError(
                f"{self.partial} was started with another checkpoint, other records or other options; name another "
                "output, or give --overwrite"
            )
        with self.partial.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        return set(self._read_rows())

    @contextmanager
    def open_writer(self) -> Iterator[Callable[[Iterable[tuple[int, dict[str, object]]]], None]]:
        """Yield a function that writes numbered rows to disk."""
        with self.partial.open("a", encoding="utf-8") as file:

            def write(rows: Iterable[tuple[int, dict[str, object]]]) -> None:
                """Write rows, each with the number of its record."""
                file.writelines(json.dumps(numbered, ensure_ascii=False) + "\n" for numbered in rows)
                file.flush()

            yield write

    def rows(self) -> list[dict[str, object]]:
        """Return the rows written so far, in the order of the records."""
        return [row for _, row in sorted(self._read_rows().items())]

    def _read_rows(self) -> dict[int, dict[str, object]]:
        """Return rows by number; of a row that was written twice, the later one."""
        with self.partial.open(encoding="utf-8") as file:
            return dict(map(json.loads, file))

    def finalize(self) -> None:
        """Write the finished file and remove the partial one."""
        whole = self.path.with_name(f"{self.path.name}.partial.whole")
        with whole.open("w", encoding="utf-8", newline="" if self.path.suffix == ".csv" else "\n") as file:
            if self.path.suffix == ".csv":
                writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows({name: _format_cell(value) for name, value in row.items()} for row in self.rows())
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
        whole.replace(self.path)
        self.partial.unlink()
        self.metadata.unlink()


def _format_cell(value: object) -> object:
    """Return a value as a cell of a `.csv`; the items of a list are joined by `;`."""
    return ";".join(map(str, value)) if isinstance(value, list) else value
