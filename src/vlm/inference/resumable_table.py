"""A file of rows about records, written as they come, and gone on with where it was stopped.

Rows are written to `OUTPUT.partial` in the order in which they are made, each with the number of its record, and to
OUTPUT in the order of the records when all are there; `OUTPUT.partial.json` says what is being written, so that another
run goes on with nothing but that.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".jsonl")
"""What an output may end in."""


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise ValueError where a table cannot be written to a path, or would replace what is there."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: it must end in {' or '.join(SUFFIXES)}")
    place = next(parent for parent in output.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--output {output}: {place} is no folder that can be written to")
    if output.is_dir():
        raise ValueError(f"--output {output}: this is a folder")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; name another output, or give --overwrite")


class ResumableTable:
    """A file of rows that is complete once it has its name; until then it is JSON lines, whatever it is to be.

    Args:
        path: the file to be.
        columns: of a `.csv`; JSON lines have whatever a row has.
        fingerprint: of what is written into it.
    """

    def __init__(self, path: Path, columns: Sequence[str], fingerprint: str):
        self.path, self.columns, self.fingerprint = path, columns, fingerprint
        self.partial = path.with_name(f"{path.name}.partial")
        self.metadata = path.with_name(f"{path.name}.partial.json")

    def begin_or_resume(self, *, overwrite: bool) -> set[int]:
        """The records whose rows are there already, of a run that was stopped; a torn row is cut off.

        Args:
            overwrite: whether what was begun is begun again.

        Raises:
            ValueError: what was begun is something else.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"fingerprint": self.fingerprint, "rows": "with numbers"}
        if not (self.partial.exists() and self.metadata.exists()) or overwrite:
            self.partial.write_bytes(b"")  # first: no rows may stand under facts that are not theirs
            self.metadata.write_text(json.dumps(metadata) + "\n", encoding="utf-8")
            return set()
        if json.loads(self.metadata.read_text(encoding="utf-8")) != metadata:
            raise ValueError(
                f"{self.partial} was begun with another checkpoint, other records or other options; name another "
                "output, or give --overwrite"
            )
        with self.partial.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        return set(self._read_rows())

    @contextmanager
    def open_writer(self) -> Iterator[Callable[[Iterable[tuple[int, dict[str, Any]]]], None]]:
        """A function that writes rows with the numbers of their records; they are on disk then."""
        with self.partial.open("a", encoding="utf-8") as file:

            def write(rows: Iterable[tuple[int, dict[str, Any]]]) -> None:
                file.writelines(json.dumps(numbered, ensure_ascii=False) + "\n" for numbered in rows)
                file.flush()

            yield write

    def rows(self) -> list[dict[str, Any]]:
        """What has been written, in the order of the records."""
        return [row for _, row in sorted(self._read_rows().items())]

    def _read_rows(self) -> dict[int, dict[str, Any]]:
        """Rows by their numbers; of one that was written twice, the later."""
        with self.partial.open(encoding="utf-8") as file:
            return dict(map(json.loads, file))

    def finalize(self) -> None:
        """Give the file its form and its name."""
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


def _format_cell(value: Any) -> Any:
    """A value of a row as a cell: what a list holds is joined by `;`."""
    return ";".join(map(str, value)) if isinstance(value, list) else value
