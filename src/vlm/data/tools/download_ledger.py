"""What a folder of `vlm data download` has of its table: `records.jsonl`, `failures.jsonl` and `download.json`."""

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from vlm.data.sample import PLACEHOLDER, Record
from vlm.data.tools.table import Row, Table

OPTION_BEHIND = {
    "private address": "allow_private",
    "too large": "max_bytes",
    "too small": "min_size",
    "timed out": "timeout",
}
"""Reason of a failure -> the option that caused it: with another value, the row is fetched again."""


@dataclass(frozen=True)
class Outcome:
    """The result for a row: the image's path within the folder of images, or the reason why there is none."""

    row: Row
    image: str | None = None
    reason: str = ""
    detail: str = ""


def claim_output_folder(output: Path, table: Table) -> None:
    """Mark the folder as this table's; ValueError if it is another's."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "download.json"
    identity = table.identity()
    if not file.exists():
        if taken := [name for name in ("images", "records.jsonl", "failures.jsonl") if (output / name).exists()]:
            raise ValueError(
                f"{output} has {taken[0]} but no download.json, so it was not made by this command; choose another "
                "folder"
            )
        partial = output / "download.json.partial"
        partial.write_text(json.dumps({"table": table.path.name, **identity}, indent=2), encoding="utf-8")
        partial.replace(file)
        return
    existing = json.loads(file.read_text(encoding="utf-8"))
    if changed := [f"{k} {existing.get(k)} there, {v} here" for k, v in identity.items() if existing.get(k) != v]:
        other = f"another table, {existing.get('table')}, or other columns ({'; '.join(changed)})"
        raise ValueError(f"{output} has the images of {other}: choose another folder")


class DownloadLedger:
    """The records and failures of a folder, which only one process may write: which rows are done.

    Args:
        output: the folder.
        options: the options of this download, by name; those of `OPTION_BEHIND` are recorded with failures.

    Raises:
        ValueError: another process writes to the folder, or a file is broken.
    """

    def __init__(self, output: Path, options: Mapping[str, object]):
        self.got = 0
        self._options = options
        self.failed: Counter[str] = Counter()
        self._done = bytearray()  # a byte a row
        self._records = (output / "records.jsonl").open("a+b")
        self._failures = (output / "failures.jsonl").open("a+b")
        try:
            fcntl.flock(self._records, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError as error:
            raise ValueError(f"another download writes to {output}: wait for it, or stop it") from error
        for number, _ in read_complete_lines(self._records, "id"):
            self._mark_done(number)
            self.got += 1
        failures = list(read_complete_lines(self._failures, "row"))
        final = [failure for _, failure in failures if not self._is_allowed_now(failure)]
        if len(final) < len(failures):
            self._failures.truncate(0)
        for failure in final:
            if len(final) < len(failures):
                append_line(self._failures, failure)
            self._mark_done(int(failure["row"]))
            self.failed[failure["reason"]] += 1

    def __enter__(self) -> Self:
        """Return the ledger."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._records.close()
        self._failures.close()

    @property
    def num_done(self) -> int:
        """The number of rows that need no fetching."""
        return self.got + self.failed.total()

    def is_done(self, number: int) -> bool:
        """Return whether a row was fetched, or failed."""
        return number < len(self._done) and self._done[number] == 1

    def clear_failures(self) -> None:
        """Remove the failures, so that their rows are fetched again."""
        for number, _ in read_complete_lines(self._failures, "row"):
            self._done[number] = 0
        self._failures.truncate(0)
        self.failed.clear()

    def _is_allowed_now(self, failure: Record) -> bool:
        """Return whether the option that made a row fail has another value now."""
        option = OPTION_BEHIND.get(failure["reason"])
        if option is None:
            return False
        before = failure.get(option, False if option == "allow_private" else None)  # None: of a version without it
        return before is not None and before != self._options[option]

    def add(self, outcome: Outcome) -> None:
        """Write the outcome of a row."""
        row = outcome.row
        if outcome.image is None:
            failure: Record = {"row": row.number, "url": row.url, "reason": outcome.reason, "detail": outcome.detail}
            if option := OPTION_BEHIND.get(outcome.reason):
                failure[option] = self._options[option]
            append_line(self._failures, failure)
            self.failed[outcome.reason] += 1
        else:
            turns = [{"from": "human", "value": PLACEHOLDER}, {"from": "gpt", "value": row.caption}]
            append_line(self._records, {"id": f"{row.number:09d}", "image": outcome.image, "conversations": turns})
            self.got += 1
        self._mark_done(row.number)

    def _mark_done(self, number: int) -> None:
        self._done.extend(bytes(max(0, number + 1 - len(self._done))))
        self._done[number] = 1


def append_line(file: BinaryIO, line: Record) -> None:
    """Append a line so that it is kept even if the process is killed."""
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()


def read_complete_lines(file: BinaryIO, key: str) -> Iterator[tuple[int, Record]]:
    """Iterate over the lines of a file, with the numbers of their rows; an incomplete last line is removed.

    Raises:
        ValueError: a line before the end is broken.
    """
    end = 0
    file.seek(0)
    for line in file:
        try:
            record = json.loads(line if line.endswith(b"\n") else b"")
            number = int(record[key])
        except (ValueError, KeyError, TypeError) as error:
            if file.read(1):
                raise ValueError(f"{file.name}: the line at byte {end} is broken; fix or remove it") from error
            file.truncate(end)
            return
        end += len(line)
        yield number, record
