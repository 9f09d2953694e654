"""Vectors of the records of a file, written row by row and resumed where it was stopped.

`OUTPUT.jsonl` has them beside their records; `OUTPUT.npy` is an array `(records, width)`, whose records stand in
`OUTPUT.ids.jsonl`, in the same order.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlm.inference.resumable_table import ResumableTable

VECTOR_SUFFIXES = (".jsonl", ".npy")
"""Allowed suffixes of an output."""
VECTOR = "vector"
"""The column of vectors; until all are there, as float32 in base64."""


def pack_vector(vector: np.ndarray) -> str:
    """Return a vector as it stands in a table that is not finished."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def unpack_vector(text: str) -> np.ndarray:
    """Return the vector of `pack_vector`."""
    return np.frombuffer(base64.b64decode(text), "<f4")


def ids_path(output: Path) -> Path:
    """Return the file that names the records of an array."""
    return output.with_name(f"{output.stem}.ids.jsonl")


class VectorTable(ResumableTable):
    """A table of vectors of `width` numbers; records without one have NaN in an array, null in JSON lines."""

    def __init__(self, path: Path, width: int, fingerprint: str):
        super().__init__(path, (), fingerprint)
        self.width = width

    def _read_rows(self) -> dict[int, dict[str, object]]:
        """Return rows by number, without their vectors: those of a large file need not fit in memory."""
        rows = {}
        with self.partial.open(encoding="utf-8") as file:
            for line in file:
                number, row = json.loads(line)
                row.pop(VECTOR)
                rows[number] = row
        return rows

    def _iterate(self) -> Iterator[tuple[dict[str, object], np.ndarray | None]]:
        """Yield rows and their vectors, in the order of the records."""
        places: dict[int, int] = {}
        with self.partial.open("rb") as file:
            position = 0
            for line in file:
                places[json.loads(line)[0]] = position
                position += len(line)
            for _, place in sorted(places.items()):
                file.seek(place)
                _, row = json.loads(file.readline())
                packed = row.pop(VECTOR)
                yield row, None if packed is None else unpack_vector(packed)

    def finalize(self) -> None:
        """Write the finished files and remove the partial one."""
        if self.path.suffix == ".npy":
            self._write_array()
        else:
            self._write_lines(self.path, with_vectors=True)
        self.partial.unlink()
        self.metadata.unlink()

    def _write_lines(self, path: Path, *, with_vectors: bool) -> None:
        whole = path.with_name(f"{path.name}.whole")
        with whole.open("w", encoding="utf-8", newline="\n") as file:
            for row, vector in self._iterate():
                listed = None if vector is None else [float(f"{number:.9g}") for number in vector.tolist()]
                file.write(json.dumps(row | ({VECTOR: listed} if with_vectors else {}), ensure_ascii=False) + "\n")
        whole.replace(path)

    def _write_array(self) -> None:
        whole = self.path.with_name(f"{self.path.name}.whole")
        number = len(self._read_rows())
        array = np.lib.format.open_memmap(whole, "w+", np.float32, (number, self.width))
        for index, (_, vector) in enumerate(self._iterate()):
            array[index] = np.nan if vector is None else vector
        array.flush()
        del array
        self._write_lines(ids_path(self.path), with_vectors=False)
        whole.replace(self.path)
