"""A file of rows about records, written as they come, and gone on with where it was stopped.

Rows are written to `OUTPUT.partial`, which becomes OUTPUT when it is complete; `OUTPUT.partial.json` beside it says
what is being written, so that another run goes on with nothing but that.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KINDS = (".csv", ".jsonl")
"""What an output may end in."""


def need_new(output: Path, *, overwrite: bool) -> None:
    """Raise ValueError where a table cannot be written to a path, or would replace what is there."""
    if output.suffix not in KINDS:
        raise ValueError(f"--output {output}: it must end in {' or '.join(KINDS)}")
    place = next(parent for parent in output.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--output {output}: {place} is no folder that can be written to")
    if output.is_dir():
        raise ValueError(f"--output {output}: this is a folder")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; name another output, or give --overwrite")


class Table:
    """A file of rows that is complete once it has its name; until then it is JSON lines, whatever it is to be.

    Args:
        path: the file to be.
        columns: of a `.csv`; JSON lines have whatever a row has.
        fingerprint: of what is written into it.
    """

    def __init__(self, path: Path, columns: Sequence[str], fingerprint: str):
        self.path, self.columns, self.fingerprint = path, columns, fingerprint
        self.partial = path.with_name(f"{path.name}.partial")
        self.facts = path.with_name(f"{path.name}.partial.json")

    def begin(self, batch_size: int = 1, *, overwrite: bool) -> int:
        """How many rows are there already, of a run that was stopped; what it left of a last batch is cut off.

        Args:
            batch_size: rows that are made together: another run makes the same batches.
            overwrite: whether what was begun is begun again.

        Raises:
            ValueError: what was begun is something else.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not (self.partial.exists() and self.facts.exists()) or overwrite:
            self.facts.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n", encoding="utf-8")
            self.partial.write_bytes(b"")
            return 0
        if json.loads(self.facts.read_text(encoding="utf-8"))["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.partial} was begun with another checkpoint, other records or other options; name another "
                "output, or give --overwrite"
            )
        content = self.partial.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        kept = lines[: len(lines) - len(lines) % batch_size]
        self.partial.write_bytes(b"".join(kept))
        return len(kept)

    @contextmanager
    def opened(self) -> Iterator[Callable[[Sequence[dict[str, Any]]], None]]:
        """A function that writes rows, which are on disk then."""
        with self.partial.open("a", encoding="utf-8") as file:

            def write(rows: Sequence[dict[str, Any]]) -> None:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()

            yield write

    def rows(self) -> list[dict[str, Any]]:
        """What has been written."""
        with self.partial.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def finish(self) -> None:
        """Give the file its form and its name."""
        if self.path.suffix == ".csv":
            table = self.path.with_name(f"{self.path.name}.partial.csv")
            with table.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows({name: _cell(value) for name, value in row.items()} for row in self.rows())
            table.replace(self.path)
            self.partial.unlink()
        else:
            self.partial.replace(self.path)
        self.facts.unlink()


def _cell(value: Any) -> Any:
    """A value of a row as a cell: what a list holds is joined by `;`."""
    return ";".join(map(str, value)) if isinstance(value, list) else value
