"""`vlm data download`: fetch the images of a table of URLs and captions into a folder that training reads.

`OUT/images/00001/000012345.jpg` is the image of row 12345 (from 0, without the header), byte for byte.
`OUT/records.jsonl` has a record in LLaVA's form for each image, `OUT/failures.jsonl` a line for each failure, both in
the order in which they came. A line is written when its row is done, so the command may be killed at any time and is
resumed by starting it again; `OUT/download.json` names the table that the folder belongs to.

`table` reads the table, `fetch` fetches and checks images.
"""

import fcntl
import json
import os
import shutil
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from queue import Queue, SimpleQueue
from typing import Any, BinaryIO, Self

import httpx2
from PIL import Image
from tqdm import tqdm

from vlm.config.shown import PresentableParser, presentable, printable
from vlm.data.sample import PLACEHOLDER, Record
from vlm.data.tools.fetch import Fetcher, FetchError, FetchStopped, check_image_suffix
from vlm.data.tools.table import FOLDER_SIZE, TABLE_KINDS, Row, Table

SHUTDOWN_TIMEOUT = 2.0
"""Seconds that a stopped command waits for its threads."""
MAX_WORKERS = 256
"""Each worker may have three files open, and processes are often limited to 1024."""


OPTION_BEHIND = {
    "private address": "allow_private", "too large": "max_bytes", "too small": "min_size", "timed out": "timeout",
}  # fmt: skip
"""Reason of a failure -> the option that caused it: with another value, the row is fetched again."""
ADVICE = {
    "private address": "--allow-private fetches from this machine and private networks, for tables that you trust",
    "too large": "--max-bytes N allows larger files",
    "too small": "--min-size N allows smaller images",
}
"""Reason of a failure -> the option that allows it."""


EXAMPLES = (
    "vlm data download Train_GCC-training.tsv captions",
    "vlm data download photos.csv photos --url-column link --caption-column title --limit 1000",
)


def flag(default: object, text: str) -> Any:  # as `dataclasses.field`
    """Make a field with its text of `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Options:
    """How to download; each field is a flag of the same name."""

    url_column: str | None = flag(None, "column of URLs: its name, or in a file without a header its number from 1")
    caption_column: str | None = flag(None, "column of captions, in the same way")
    workers: int = flag(32, f"number of images fetched at the same time, at most {MAX_WORKERS} (default: %(default)s)")
    retries: int = flag(
        2, "number of retries after timeouts, broken connections and server errors (default: %(default)s)"
    )
    timeout: float = flag(10.0, "seconds allowed for each try, from look-up to last byte (default: %(default)s)")
    max_bytes: int = flag(20 * 2**20, "largest file in bytes (default: %(default)s)")
    min_size: int = flag(0, "fewest pixels of the shorter side (default: %(default)s)")
    limit: int | None = flag(None, "only use the first N rows of the table")
    allow_private: bool = flag(
        False, "also fetch from this machine and private networks; only for tables that you trust"
    )
    retry_failed: bool = flag(False, "retry everything that failed in earlier runs")

    def __post_init__(self) -> None:
        """Raise ValueError for a number out of its bounds."""
        bounds = {
            "workers": (1, MAX_WORKERS), "retries": (0, 20), "timeout": (0.1, 3600), "max_bytes": (1, 2**31),
            "min_size": (0, 2**16), "limit": (1, 2**40),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}={value}; allowed are {least} to {most}")


@dataclass(frozen=True)
class DownloadSummary:
    """A folder's number of images and, by reason, of rows that failed, earlier runs included."""

    output: Path
    got: int
    failed: dict[str, int]

    def __str__(self) -> str:
        """Return the numbers of images that came and failed, and what to do next."""
        missing = sum(self.failed.values())
        lines = [f"{self.got} images fetched, {missing} failed"]
        lines += [f"{count:>9}  {reason}" for reason, count in Counter(self.failed).most_common()]
        for reason, advice in ADVICE.items():
            if self.failed.get(reason):
                lines.append(f"{reason}: {advice}")
        if missing:
            lines.append(
                f"failures are listed in {self.output / 'failures.jsonl'}; --retry-failed tries all of them again"
            )
        if self.got:
            records, images = self.output / "records.jsonl", self.output / "images"
            lines.append(f"to train: dataset.path={records} dataset.image_folder={images}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """The result for a row: the image's path within the folder of images, or the reason why there is none."""

    row: Row
    image: str | None = None
    reason: str = ""
    detail: str = ""


def main(arguments: Sequence[str]) -> None:
    """`vlm data download TABLE OUT`."""
    parser = PresentableParser(
        "vlm data download",
        description="Download the images of a table of URLs and captions. If it is stopped, the same command "
        "continues. FOLDER/records.jsonl and FOLDER/images are what training reads; FOLDER/failures.jsonl lists what "
        "failed and why.",
        examples=EXAMPLES,
    )  # fmt: skip
    parser.add_argument("table", type=Path, help=f"URLs and captions: {', '.join(TABLE_KINDS)}")
    parser.add_argument(
        "output", type=Path, metavar="FOLDER", help="the folder to write; name the same one again to continue"
    )
    for option in fields(Options):
        name, default = option.name, option.default
        style: dict[str, Any] = {"action": "store_true"}
        if not isinstance(default, bool):
            kind = int if name == "limit" else str if default is None else type(default)
            style = {"type": kind, "default": default, "metavar": "COLUMN" if kind is str else "N"}
        spellings = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        parser.add_argument(*spellings, help=option.metadata["help"], **style)
    args = vars(parser.parse_args(arguments))
    try:
        summary = download(args.pop("table"), args.pop("output"), Options(**args))
        print(printable(str(summary)))
        if not summary.got:
            sys.exit("vlm data download: no image was fetched, so there is nothing to train on")
    except KeyboardInterrupt:
        kept = "the images fetched so far are kept, and the same command continues from there"
        print(f"\nstopped; {kept}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm data download: {presentable(error)}")


def download(table: Path, output: Path, options: Options) -> DownloadSummary:
    """Fetch the images of a table that a folder does not have yet.

    Args:
        table: a file of one of `TABLE_KINDS`.
        output: the folder; created where it is missing.
        options: how to download.

    Raises:
        ValueError: the table cannot be read, its columns are not recognised, or the folder is another table's.
        OSError: the disk is full, and the like.
    """
    source = Table(table, options.url_column, options.caption_column)
    claim_output_folder(output, source)
    with (
        DownloadLedger(output, options) as ledger, DownloadWorkers(output, options) as workers,
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
        if options.retry_failed:
            ledger.clear_failures()
        rows = (row for row in islice(source.rows(), options.limit) if not ledger.is_done(row.number))
        total = min(source.num_rows, options.limit or source.num_rows)
        with tqdm(total=total, initial=min(total, ledger.num_done), desc="images", unit="") as bar:
            for outcome in workers.outcomes(rows):
                ledger.add(outcome)
                bar.set_postfix(got=ledger.got, failed=ledger.failed.total(), refresh=False)
                bar.update()
    return DownloadSummary(output, ledger.got, dict(ledger.failed))


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

    Raises:
        ValueError: another process writes to the folder, or a file is broken.
    """

    def __init__(self, output: Path, options: Options):
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
        return before is not None and before != getattr(self._options, option)

    def add(self, outcome: Outcome) -> None:
        """Write the outcome of a row."""
        row = outcome.row
        if outcome.image is None:
            failure = {"row": row.number, "url": row.url, "reason": outcome.reason, "detail": outcome.detail}
            if option := OPTION_BEHIND.get(outcome.reason):
                failure[option] = getattr(self._options, option)
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


class DownloadWorkers:
    """Threads that fetch images. They are daemons, so that a command that is stopped does not wait for servers."""

    def __init__(self, output: Path, options: Options):
        self._images, self._partial = output / "images", output / "partial"
        self._options = options
        self._ssl_context = httpx2.create_ssl_context()
        self._stop = threading.Event()
        self._decoders = threading.BoundedSemaphore(os.cpu_count() or 1)  # a decoded image may be large
        self._tasks: Queue[Row | None] = Queue()
        self._results: SimpleQueue[Outcome | Exception] = SimpleQueue()
        self._threads = [threading.Thread(target=self._run_worker, daemon=True) for _ in range(options.workers)]

    def __enter__(self) -> Self:
        """Start the threads."""
        Image.init()  # before threads would do so at the same time
        shutil.rmtree(self._partial, ignore_errors=True)  # of a killed run
        self._partial.mkdir()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the threads and remove files that were begun."""
        self._stop.set()
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + SHUTDOWN_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        shutil.rmtree(self._partial, ignore_errors=True)

    def outcomes(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """Iterate over outcomes in the order in which they come; few rows are taken ahead of them."""
        rows = iter(rows)
        num_pending = 0
        while True:
            for row in islice(rows, 2 * len(self._threads) - num_pending):
                self._tasks.put(row)
                num_pending += 1
            if not num_pending:
                return
            result = self._results.get()
            if isinstance(result, Exception):
                raise result
            yield result
            num_pending -= 1

    def _run_worker(self) -> None:
        options = self._options
        fetcher = Fetcher(
            timeout=options.timeout, retries=options.retries, max_bytes=options.max_bytes,
            allow_private=options.allow_private, ssl_context=self._ssl_context, stop=self._stop,
        )  # fmt: skip
        try:
            while not self._stop.is_set() and (row := self._tasks.get()) is not None:
                self._results.put(self._fetch_row(row, fetcher))
        except FetchStopped:
            pass
        except Exception as error:  # such as a full disk, which ends the run
            self._results.put(error)
        finally:
            fetcher.close()

    def _fetch_row(self, row: Row, fetcher: Fetcher) -> Outcome:
        try:
            check_row_text(row)
            content = fetcher.fetch(row.url)
            with self._decoders:
                suffix = check_image_suffix(content, self._options.min_size)
        except FetchError as error:
            return Outcome(row, reason=error.reason, detail=error.detail)
        image = f"{row.number // FOLDER_SIZE:05d}/{row.number:09d}.{suffix}"
        partial, final = self._partial / f"{row.number:09d}", self._images / image
        partial.write_bytes(content)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(final)
        return Outcome(row, image)


def check_row_text(row: Row) -> None:
    """Raise `FetchError` where a row lacks its URL or caption, or is not UTF-8."""
    if not row.url:
        raise FetchError("no URL")
    if not row.caption:
        raise FetchError("empty caption")
    try:
        f"{row.url}{row.caption}".encode()
    except UnicodeEncodeError as error:
        raise FetchError("not UTF-8") from error
