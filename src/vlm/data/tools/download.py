"""`vlm data download`: fetch the images of a table of URLs and captions into a folder that training reads.

`OUT/images/00001/000012345.jpg` is the image of row 12345 (from 0, without the header), byte for byte.
`OUT/records.jsonl` has a record in LLaVA's form for each image, `OUT/failures.jsonl` a line for each failure, both in
the order in which they came. A line is written when its row is done, so the command may be killed at any time and is
resumed by starting it again; `OUT/download.json` names the table that the folder belongs to.

`table` reads the table, `fetch` fetches and checks images, `download_ledger` keeps the files above.
"""

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
from typing import Any, Self

import httpx2
from PIL import Image
from tqdm import tqdm

from vlm.config.shown import PresentableParser, presentable, printable
from vlm.data.tools.download_ledger import DownloadLedger, Outcome, claim_output_folder
from vlm.data.tools.fetch import Fetcher, FetchError, FetchStopped, check_image_suffix
from vlm.data.tools.table import FOLDER_SIZE, TABLE_KINDS, Row, Table

SHUTDOWN_TIMEOUT = 2.0
"""Seconds that a stopped command waits for its threads."""
MAX_WORKERS = 256
"""Each worker may have three files open, and processes are often limited to 1024."""

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
            "workers": (1, MAX_WORKERS),
            "retries": (0, 20),
            "timeout": (0.1, 3600),
            "max_bytes": (1, 2**31),
            "min_size": (0, 2**16),
            "limit": (1, 2**40),
        }
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


def main(arguments: Sequence[str]) -> None:
    """`vlm data download TABLE OUT`."""
    parser = PresentableParser(
        "vlm data download",
        description="Download the images of a table of URLs and captions. If it is stopped, the same command "
        "continues. FOLDER/records.jsonl and FOLDER/images are what training reads; FOLDER/failures.jsonl lists what "
        "failed and why.",
        examples=EXAMPLES,
    )
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
        DownloadLedger(output, vars(options)) as ledger,
        DownloadWorkers(output, options) as workers,
        warnings.catch_warnings(),
    ):
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
            timeout=options.timeout,
            retries=options.retries,
            max_bytes=options.max_bytes,
            allow_private=options.allow_private,
            ssl_context=self._ssl_context,
            stop=self._stop,
        )
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
