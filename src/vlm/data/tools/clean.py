"""The tool `vlm data clean`: leaves out the records that cannot be used, and those that say the same again.

Every record is looked at once, in parallel (`verdicts`), and its verdict is appended to a journal beside the
output, so that a run which was stopped, whatever stopped it, goes on where it was. What repeats another record follows
from the verdicts in their order.
"""

import argparse
import base64
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from vlm.data.cache import resolve_cache_folder
from vlm.data.records.formats import FORMATS
from vlm.data.records.open import Records
from vlm.data.tools.verdicts import REASONS, CleanTask, RecordVerdict, check_records

DUPLICATES = ("record", "picture", "keep")


@dataclass(frozen=True)
class CleanSummary:
    """What came out.

    Attributes:
        records: how many there were.
        kept: how many can be used.
        dropped: reason -> how many.
        examples: reason -> the first of them, in words.
    """

    records: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.records} records: {self.kept} kept, {sum(self.dropped.values())} dropped"]
        for reason, number in self.dropped.items():
            lines += [f"  {reason:<9} {number:>9}  {REASONS[reason]}", f"    such as {self.examples[reason]}"]
        return "\n".join(lines)


class OutputFiles:
    """The files around an output: it appears as a whole at the end, and what leads up to it goes away."""

    def __init__(self, output: Path):
        self.output = output
        self.dropped = output.with_name(f"{output.stem}-dropped.jsonl")
        self.partial = output.with_name(f"{output.name}.partial")
        self.partial_dropped = output.with_name(f"{self.dropped.name}.partial")
        self.journal = output.with_name(f"{output.name}.journal.jsonl")
        self.lock = output.with_name(f"{output.name}.lock")

    def check(self, source: str, *, force: bool) -> None:
        """Refuse to write where something stands.

        Raises:
            ValueError: with the file and what to do.
        """
        if self.output.suffix != ".jsonl":
            raise ValueError(f"OUTPUT {self.output}: one record a line is written, to a file named .jsonl")
        if not self.output.parent.is_dir():
            raise ValueError(f"OUTPUT {self.output}: there is no folder {self.output.parent}")
        given, folder = Path(source).resolve(), self.output.parent.resolve()
        if any(place.resolve() == given for place in vars(self).values()):
            raise ValueError(f"OUTPUT {self.output}: that would write over the input {source}; name another file")
        if folder == given or given in folder.parents:
            raise ValueError(f"OUTPUT {self.output} lies in the input {source}, which must stay as it is; name another")
        if self.output.exists() and not force:
            raise ValueError(f"OUTPUT {self.output} exists; name another file, or give --force to replace it")

    def finish(self) -> None:
        """Everything is written: put it in its place. The journal goes last, so that nothing is lost before."""
        self.partial_dropped.replace(self.dropped)
        self.partial.replace(self.output)
        self.journal.unlink()


def clean(
    task: CleanTask, output: Path, *, duplicates: str = "record", workers: int | None = None, force: bool = False,
    dry_run: bool = False,
) -> CleanSummary:  # fmt: skip
    """Write the records that can be used to `output`, and why others cannot to `OUTPUT-dropped.jsonl` beside it.

    Args:
        task: what is cleaned, and by which rules.
        output: a file named `.jsonl`.
        duplicates: `record` drops records with pictures and text of an earlier one; `picture` also those with a picture
            of an earlier one; `keep` none. About 140 MB of memory for a million records, or pictures.
        workers: processes; None: as many as there are cores.
        force: replaces an output that exists.
        dry_run: writes nothing, and so cannot be gone on with.

    Raises:
        ValueError: the task cannot be done as it is asked for.
    """
    if duplicates not in DUPLICATES:
        raise ValueError(f"--duplicates {duplicates}: allowed are {', '.join(DUPLICATES)}")
    if task.max_aspect is not None and task.max_aspect < 1:
        raise ValueError(f"--max-aspect {task.max_aspect}: it is the longer side over the shorter, so 1 or more")
    places = OutputFiles(output)
    task.reader()
    if dry_run:
        records = task.records()
        return write_verdicts(
            records, check_records(task, records, 0, workers), duplicates, Path(os.devnull), Path(os.devnull)
        )
    places.check(task.source, force=force)
    records = task.records()
    try:
        with FileLock(places.lock, blocking=False):
            with VerdictJournal(places.journal, task, records) as journal:
                verdicts = journal.resume(workers)
                summary = write_verdicts(records, verdicts, duplicates, places.partial, places.partial_dropped)
            places.finish()
            places.lock.unlink()
    except Timeout:
        raise ValueError(f"OUTPUT {output}: another process is writing it") from None
    return summary


def write_verdicts(
    records: Records, verdicts: Iterator[RecordVerdict], duplicates: str, kept: Path, dropped: Path
) -> CleanSummary:
    """Write kept records to one file and the other verdicts to another, in order."""
    seen = DuplicateFinder(duplicates)
    counts, examples = dict.fromkeys(REASONS, 0), {}
    with kept.open("wb") as output, dropped.open("w", encoding="ascii") as others:
        for number, verdict in enumerate(tqdm(verdicts, "records", len(records), unit="record")):
            found = seen.mark_duplicate(number, verdict)
            if found.reason is None:
                output.write(record_to_json_line(records[number]))
                continue
            counts[found.reason] += 1
            examples.setdefault(found.reason, f"record {number} ({found.id!r}): {found.detail}")
            line = {key: getattr(found, key) for key in ("id", "reason", "detail", "file")}
            others.write(json.dumps({"record": number, **line}) + "\n")
    counts = {reason: count for reason, count in counts.items() if count}
    return CleanSummary(len(records), len(records) - sum(counts.values()), counts, examples)


class DuplicateFinder:
    """Finds records that repeat an earlier one, by 128-bit digests that stay in memory: about 140 bytes for each.

    Args:
        by: one of `DUPLICATES`.
    """

    def __init__(self, by: str):
        self._criterion = by
        self._record_by_digest: dict[bytes, int] = {}

    def mark_duplicate(self, number: int, verdict: RecordVerdict) -> RecordVerdict:
        """The verdict, or another where the record repeats one that was kept."""
        if verdict.reason or self._criterion == "keep":
            return verdict
        alike = self._criterion == "picture" and verdict.pictures
        keys = [bytes.fromhex(digest) for digest in (verdict.pictures if alike else [verdict.digest])]
        earlier = next((self._record_by_digest[key] for key in keys if key in self._record_by_digest), None)
        if earlier is None:
            self._record_by_digest.update(dict.fromkeys(keys, number))
            return verdict
        what = "has a picture of" if alike else "has the text and pictures of"
        return replace(verdict, reason="duplicate", detail=f"{what} record {earlier}")


class VerdictJournal:
    """Verdicts on disk, one a line, after a line that says what was asked for.

    Args:
        path: the file; made where it is missing, and begun anew where something else was asked for.
        task: what is cleaned.
        records: its records.
    """

    def __init__(self, path: Path, task: CleanTask, records: Records):
        self.task, self.records = task, records
        rules = {name: value for name, value in asdict(task).items() if name not in ("source", "cache")}
        asked = {**rules, "image_folder": str(task.folder.resolve()), "fingerprint": records.fingerprint}
        head = json.dumps(asked).encode() + b"\n"
        self._file = path.open("a+b")
        self._file.seek(0)
        first = self._file.readline()
        if first == head:
            return
        if (before := _parse_line(first)) is not None:
            changed = [name for name, value in json.loads(head).items() if before.get(name) != value]
            names = ["the records" if name == "fingerprint" else name for name in changed]
            tqdm.write(f"{path}: since that run was stopped, {', '.join(names)} changed; beginning anew")
        self._file.truncate(0)
        self._file.write(head)
        self._file.flush()

    def __enter__(self) -> "VerdictJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def resume(self, workers: int | None) -> Iterator[RecordVerdict]:
        """The verdicts that are there, then those of the other records, which are appended."""
        known = 0
        for verdict in self._read_known():
            known += 1
            yield verdict
        if known:
            tqdm.write(f"{known} of {len(self.records)} records were looked at before; going on from there")
        for verdict in check_records(self.task, self.records, known, workers):
            self._file.write(json.dumps(vars(verdict)).encode() + b"\n")
            self._file.flush()
            yield verdict

    def _read_known(self) -> Iterator[RecordVerdict]:
        """The verdicts up to a line that was not written to its end, which is cut off."""
        end = self._file.tell()
        while line := self._file.readline():
            if (values := _parse_line(line)) is None:
                self._file.truncate(end)
                return
            end += len(line)
            yield RecordVerdict(**values)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None for one that is not whole."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def record_to_json_line(record: Any) -> bytes:
    """A record as a line of JSON. What JSON cannot hold: pictures become data: addresses, dates and the like text."""
    text = json.dumps(_without_bytes(record), ensure_ascii=False, default=str)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can stand for
        return json.dumps(_without_bytes(record), default=str).encode() + b"\n"


def _without_bytes(value: Any) -> Any:
    """A value without bytes."""
    if isinstance(value, dict):
        if isinstance(content := value.get("bytes"), bytes):
            return _data_url(content)
        return {key: _without_bytes(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_bytes(inner) for inner in value]
    return _data_url(value) if isinstance(value, bytes) else value


def _data_url(content: bytes) -> str:
    """Bytes as a data: address, which the readers know as a picture."""
    try:
        with Image.open(BytesIO(content)) as image:
            kind = f"image/{str(image.format).lower()}"
    except UnidentifiedImageError:
        kind = "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def main(arguments: Sequence[str]) -> None:
    """`vlm data clean INPUT OUTPUT --format llava`."""
    args = _parser().parse_args(arguments)
    task = CleanTask(
        args.input, resolve_cache_folder(args.cache_dir), args.image_folder or "", args.format, tuple(args.option), args.split,
        args.subset, args.min_side, args.max_aspect,
    )  # fmt: skip
    output = Path(args.output)
    how = {"duplicates": args.duplicates, "workers": args.workers, "force": args.force, "dry_run": args.dry_run}
    try:
        print(clean(task, output, **how))
    except (ValueError, OSError) as error:
        sys.exit(f"vlm data clean: {error}")
    except KeyboardInterrupt:
        sys.exit("vlm data clean: stopped" if args.dry_run else "vlm data clean: stopped; run it again to go on")
    if not args.dry_run:
        print(f"kept in {output}, with image paths relative to {task.folder}; dropped in {OutputFiles(output).dropped}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vlm data clean", description="Leave out records that cannot be used or say the same again.",
        epilog="Stopped, by whatever it was, the same command goes on where it was, out of OUTPUT.journal.jsonl; "
        "delete that to look at every picture again.",
    )  # fmt: skip
    parser.add_argument("input", metavar="INPUT", help=".json, .jsonl, .parquet …, whatever dataset.path takes")
    parser.add_argument("output", metavar="OUTPUT", help="a .jsonl file; beside it, OUTPUT-dropped.jsonl says why")
    parser.add_argument(
        "--format", default=CleanTask.format, help=f"{', '.join(FORMATS)}, or package.module:function (%(default)s)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the format; may be repeated"
    )
    parser.add_argument("--image-folder", help="what image paths are relative to (the folder of INPUT)")
    parser.add_argument("--split", default=CleanTask.split, help="of a data set that has several (%(default)s)")
    parser.add_argument("--subset", help="of a data set on the Hub that has several")
    parser.add_argument(
        "--min-side",
        type=_positive_int,
        default=CleanTask.min_side,
        metavar="PIXELS",
        help="smaller pictures go (%(default)s)",
    )
    parser.add_argument("--max-aspect", type=float, metavar="RATIO", help="pictures of a longer shape go (any)")
    parser.add_argument(
        "--duplicates", choices=DUPLICATES, default=DUPLICATES[0],
        help="record: those with text and pictures of an earlier one go; picture: also those with a picture of an "
        "earlier one; keep: none (%(default)s). About 140 MB of memory for a million of either",
    )  # fmt: skip
    parser.add_argument("--workers", type=_positive_int, metavar="N", help="processes (as many as there are cores)")
    parser.add_argument("--cache-dir", help="where indices are kept (vlm in the folder of Hugging Face's caches)")
    parser.add_argument("--force", action="store_true", help="replace an OUTPUT that exists")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and write nothing")
    return parser


def _positive_int(text: str) -> int:
    """A number of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is needed")
    return int(text)
