"""`vlm data clean`: leave out the records that cannot be used, and duplicates.

Every record is checked once, in parallel (`verdicts`), and its verdict is appended to a journal next to the output, so
that a command that was stopped in any way resumes there. Duplicates are found from the verdicts in their order.
"""

import argparse
import base64
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from vlm.config.shown import PresentableParser, presentable, printable
from vlm.data.cache import resolve_cache_folder
from vlm.data.records.fields import label_record
from vlm.data.records.formats import FORMATS
from vlm.data.records.open import Records
from vlm.data.sample import Record
from vlm.data.tools.verdicts import REASONS, CleanTask, RecordVerdict, check_records
from vlm.data.vision.images import IMAGE_ERRORS, open_lazily
from vlm.data.vision.similarity import ImageSketch, SketchIndex

DUPLICATES = ("record", "image", "keep")
EXAMPLES = (
    "vlm data clean train.json clean.jsonl --image-folder images",
    "vlm data clean train.json clean.jsonl --image-folder images --near-duplicates --dry-run",
    "vlm data clean captions.csv clean.jsonl --format caption --duplicates image --min-side 64",
)
FORMER_NAMES = {"picture": "image"}
"""Former names of `DUPLICATES`, which are still accepted."""


@dataclass(frozen=True)
class CleanSummary:
    """How many records were kept and, by reason, how many were dropped, with a description of the first of each.

    `uniform` images of kept records are of one colour throughout, the first of them in the record `first_uniform`.
    """

    records: int
    kept: int
    dropped: dict[str, int]
    examples: dict[str, str]
    uniform: int = 0
    first_uniform: str = ""

    def __str__(self) -> str:
        """Return the numbers of records kept and dropped, with an example of each reason."""
        lines = [f"{self.records} records: {self.kept} kept, {sum(self.dropped.values())} dropped"]
        for reason, number in self.dropped.items():
            lines += [f"  {reason:<9} {number:>9}  {REASONS[reason]}", f"    for example {self.examples[reason]}"]
        if self.uniform:
            lines.append(
                f"  {self.uniform} kept images are a single colour throughout, for example in {self.first_uniform}"
            )
        return "\n".join(lines)


class OutputFiles:
    """The files around an output, which appears complete at the end, when temporary files are removed."""

    def __init__(self, output: Path):
        self.output = output
        self.dropped = output.with_name(f"{output.stem}-dropped.jsonl")
        self.partial = output.with_name(f"{output.name}.partial")
        self.partial_dropped = output.with_name(f"{self.dropped.name}.partial")
        self.journal = output.with_name(f"{output.name}.journal.jsonl")
        self.lock = output.with_name(f"{output.name}.lock")

    def check(self, source: str, *, force: bool) -> None:
        """Raise ValueError if something would be overwritten; tells the file and what to do."""
        if self.output.suffix != ".jsonl":
            raise ValueError(f"OUTPUT {self.output}: the name must end in .jsonl, since one record is written per line")
        if not self.output.parent.is_dir():
            raise ValueError(f"OUTPUT {self.output}: there is no folder {self.output.parent}")
        input_path, folder = Path(source).resolve(), self.output.parent.resolve()
        if any(path.resolve() == input_path for path in vars(self).values()):
            raise ValueError(f"OUTPUT {self.output}: that would overwrite the input {source}; choose another file")
        if folder == input_path or input_path in folder.parents:
            raise ValueError(
                f"OUTPUT {self.output} is inside the input {source}, which must not change; choose another folder"
            )
        if self.output.exists() and not force:
            raise ValueError(f"OUTPUT {self.output} exists; choose another file, or replace it with --force")


def clean(
    task: CleanTask,
    output: Path,
    *,
    duplicates: str = "record",
    workers: int | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> CleanSummary:
    """Write the records that can be used to `output`, and the reasons for others to `OUTPUT-dropped.jsonl`.

    Args:
        task: the records and the rules.
        output: a file named `.jsonl`.
        duplicates: `record` drops records with images and text of an earlier one; `image` also those with an image
            of an earlier one; `keep` none. About 140 MB of memory for a million records, or images. Where the task
            says so, images that look the same count as the same, see `NearDuplicateFinder`.
        workers: number of processes; defaults to the number of cores.
        force: replaces an output that exists.
        dry_run: writes nothing, and so cannot be resumed.

    Raises:
        ValueError: an argument is invalid, or the output exists.
    """
    duplicates = FORMER_NAMES.get(duplicates, duplicates)
    if duplicates not in DUPLICATES:
        raise ValueError(f"--duplicates {duplicates}: allowed are {', '.join(DUPLICATES)}")
    if task.max_aspect is not None and task.max_aspect < 1:
        raise ValueError(f"--max-aspect {task.max_aspect}: it is the longer side over the shorter, so 1 or more")
    files = OutputFiles(output)
    task.reader()
    if dry_run:
        records = task.records()
        verdicts = check_records(task, records, 0, workers)
        nowhere = Path(os.devnull)
        return write_verdicts(records, verdicts, duplicates, nowhere, nowhere, near=task.near_duplicates)
    files.check(task.source, force=force)
    records = task.records()
    try:
        with FileLock(files.lock, blocking=False):
            verdicts = resume_verdicts(files.journal, task, records, workers)
            paths = files.partial, files.partial_dropped
            summary = write_verdicts(records, verdicts, duplicates, *paths, near=task.near_duplicates)
            files.partial_dropped.replace(files.dropped)
            files.partial.replace(output)
            files.journal.unlink()  # only now, so that nothing is lost before
            files.lock.unlink()
    except Timeout:
        raise ValueError(f"OUTPUT {output}: another process is writing it") from None
    return summary


def write_verdicts(
    records: Records,
    verdicts: Iterator[RecordVerdict],
    duplicates: str,
    kept: Path,
    dropped: Path,
    *,
    near: bool = False,
) -> CleanSummary:
    """Write kept records to one file, the other verdicts to another, in order; with `near`, near copies are equal."""
    duplicate_finder = NearDuplicateFinder(duplicates) if near else DuplicateFinder(duplicates)
    counts, examples = dict.fromkeys(REASONS, 0), {}
    uniform, first_uniform = 0, ""
    with kept.open("wb") as output, dropped.open("w", encoding="ascii") as others:
        for number, verdict in enumerate(tqdm(verdicts, "records", len(records), unit="record", disable=None)):
            verdict = duplicate_finder.mark_duplicate(number, verdict)
            if verdict.reason is None:
                output.write(record_to_json_line(records[number]))
                uniform += verdict.uniform
                if verdict.uniform and not first_uniform:
                    first_uniform = label_record(number, verdict.id)
                continue
            counts[verdict.reason] += 1
            examples.setdefault(verdict.reason, f"{label_record(number, verdict.id)}: {verdict.detail}")
            line = {key: getattr(verdict, key) for key in ("id", "reason", "detail", "file")}
            others.write(json.dumps({"record": number, **line}) + "\n")
    counts = {reason: count for reason, count in counts.items() if count}
    kept_records = len(records) - sum(counts.values())
    return CleanSummary(len(records), kept_records, counts, examples, uniform, first_uniform)


class DuplicateFinder:
    """Finds records that repeat an earlier one by one of `DUPLICATES`; keeps 128-bit digests, about 140 bytes each."""

    def __init__(self, criterion: str):
        self._criterion = criterion
        self._record_by_digest: dict[bytes, int] = {}

    def mark_duplicate(self, number: int, verdict: RecordVerdict) -> RecordVerdict:
        """Return the verdict on a record: dropped if it repeats a record that was kept."""
        if verdict.reason or self._criterion == "keep":
            return verdict
        by_image = self._criterion == "image" and bool(verdict.pictures)
        keys = [bytes.fromhex(digest) for digest in (verdict.pictures if by_image else [verdict.digest])]
        earlier = next((self._record_by_digest[key] for key in keys if key in self._record_by_digest), None)
        if earlier is None:
            self._record_by_digest.update(dict.fromkeys(keys, number))
            return verdict
        common = "has an image of" if by_image else "has the text and images of"
        return replace(verdict, reason="duplicate", detail=f"{common} record {earlier}")


class NearDuplicateFinder(DuplicateFinder):
    """Finds records that repeat an earlier one, where images that look the same count as the same.

    An image that looks like one of a kept record stands for that one. Keeps 800 bytes an image.
    """

    def __init__(self, criterion: str):
        super().__init__(criterion)
        self._index = SketchIndex()
        self._digests: list[str] = []
        self._names: list[str] = []
        self._known: dict[str, int] = {}

    def mark_duplicate(self, number: int, verdict: RecordVerdict) -> RecordVerdict:
        """Return the verdict on a record: dropped if it repeats a record that was kept, exactly or nearly."""
        if verdict.reason or self._criterion == "keep":
            return verdict
        stand_ins = [self._find(*image) for image in zip(verdict.pictures, verdict.sketches, strict=True)]
        digests = [
            self._digests[index] if index is not None else own
            for index, own in zip(stand_ins, verdict.pictures, strict=True)
        ]
        whole = hashlib.blake2b(json.dumps([verdict.text, digests]).encode(), digest_size=16).hexdigest()
        marked = super().mark_duplicate(number, replace(verdict, pictures=digests, digest=whole))
        if marked.reason is None:
            for own, sketch, name, index in zip(
                verdict.pictures, verdict.sketches, verdict.names, stand_ins, strict=True
            ):
                if index is None and sketch is not None and own not in self._known:
                    self._known[own] = self._index.add(ImageSketch.from_text(sketch))
                    self._digests.append(own)
                    self._names.append(name)
            return verdict
        copies = [
            f"{name} looks like {self._names[index]}"
            for name, own, index in zip(verdict.names, verdict.pictures, stand_ins, strict=True)
            if index is not None and self._digests[index] != own
        ]
        if not copies:
            return marked
        return replace(marked, reason="near", detail=f"{marked.detail}: {'; '.join(copies)}")

    def _find(self, digest: str, sketch: str | None) -> int | None:
        """Return the index of an image of a kept record that is the same or looks the same; None if there is none."""
        if sketch is None:
            return None
        if (known := self._known.get(digest)) is not None:
            return known
        return self._index.find(ImageSketch.from_text(sketch))


def resume_verdicts(journal: Path, task: CleanTask, records: Records, workers: int | None) -> Iterator[RecordVerdict]:
    """Iterate over the verdicts in a journal, then over those of the other records, which are appended to it.

    The journal has a line with the task, then one for each verdict; a journal of another task is emptied.
    """
    rules = {name: value for name, value in asdict(task).items() if name not in ("source", "cache")}
    header = {**rules, "image_folder": str(task.folder.resolve()), "fingerprint": records.fingerprint}
    header_line = json.dumps(header).encode() + b"\n"
    with journal.open("a+b") as file:
        file.seek(0)
        first = file.readline()
        if first != header_line:
            if (before := _parse_line(first)) is not None:
                changed = [name for name, value in json.loads(header_line).items() if before.get(name) != value]
                names = ["the records" if name == "fingerprint" else name for name in changed]
                tqdm.write(f"{journal}: {', '.join(names)} changed since that run was stopped; starting over")
            file.truncate(0)
            file.write(header_line)
            file.flush()
        known = 0
        while (line := file.readline()) and (values := _parse_line(line)) is not None:
            known += 1
            yield RecordVerdict(**values)
        file.truncate(file.tell() - len(line))  # an incomplete line at the end
        if known:
            tqdm.write(f"{known} of {len(records)} records were checked before; continuing from there")
        for verdict in check_records(task, records, known, workers):
            file.write(json.dumps(vars(verdict)).encode() + b"\n")
            file.flush()
            yield verdict


def _parse_line(line: bytes) -> Record | None:
    """Parse a line of the journal; None for an incomplete one."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def record_to_json_line(record: object) -> bytes:
    """Format a record as a line of JSON; the bytes of images become `data:` URLs, dates and the like text."""
    inlined = _inline_bytes(record)
    try:
        text = json.dumps(inlined, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can stand for
        text = json.dumps(inlined, default=str).encode()
    return text + b"\n"


def _inline_bytes(value: object) -> object:
    """Replace bytes in a value, and mappings that hold them as `bytes`, by `data:` URLs."""
    match value:
        case {"bytes": bytes(content)} | bytes(content):
            return _data_url(content)
        case dict():
            return {key: _inline_bytes(inner) for key, inner in value.items()}
        case list():
            return [_inline_bytes(inner) for inner in value]
    return value


def _data_url(content: bytes) -> str:
    """Return bytes as a `data:` URL, which readers recognise as an image."""
    try:
        with open_lazily(BytesIO(content)) as image:
            kind = f"image/{str(image.format).lower()}"
    except IMAGE_ERRORS:
        kind = "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def main(arguments: Sequence[str]) -> None:
    """`vlm data clean INPUT OUTPUT --format llava`."""
    args = _parser().parse_args(arguments)
    task = CleanTask(
        args.input, resolve_cache_folder(args.cache_dir), args.image_folder or "", args.format, tuple(args.option),
        args.split, args.subset, args.min_side, args.max_aspect, args.follow_links, args.near_duplicates,
    )  # fmt: skip
    output = Path(args.output)
    options = {name: getattr(args, name) for name in ("duplicates", "workers", "force", "dry_run")}
    try:
        print(printable(str(clean(task, output, **options))))
    except (ValueError, OSError) as error:
        sys.exit(f"vlm data clean: {presentable(error)}")
    except KeyboardInterrupt:
        sys.exit(
            "vlm data clean: stopped"
            if args.dry_run
            else "vlm data clean: stopped; run the same command again to continue"
        )
    if not args.dry_run:
        print(f"kept in {output}, with image paths relative to {task.folder}; dropped in {OutputFiles(output).dropped}")


def _parser() -> argparse.ArgumentParser:
    parser = PresentableParser(
        "vlm data clean",
        description="Remove records that cannot be used, and duplicates. If it is stopped, the same command continues "
        "from OUTPUT.journal.jsonl; delete that file to check every record again.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("input", metavar="INPUT", help=".json, .jsonl, .parquet …, whatever dataset.path takes")
    add("output", metavar="OUTPUT", help="a .jsonl file; OUTPUT-dropped.jsonl beside it lists what was removed and why")
    formats = f"{', '.join(FORMATS)}, or package.module:function (default: %(default)s)"
    add("--format", default=CleanTask.format, help=formats)
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the format; may be repeated")
    add("--image-folder", help="folder that image paths are relative to (default: the folder of INPUT)")
    add("--follow-links", action="store_true", help="follow links that lead out of the image folder")
    add("--split", default=CleanTask.split, help="split to read, of a data set that has several (default: %(default)s)")
    add("--subset", help="subset to read, of a data set on the Hub that has several")
    smaller = "remove records with an image whose shorter side is below this (default: %(default)s)"
    add("--min-side", type=_positive_int, default=CleanTask.min_side, metavar="PIXELS", help=smaller)
    add(
        "--max-aspect",
        type=float,
        metavar="RATIO",
        help="remove records with an image whose longer side is more than RATIO times the shorter (default: keep all)",
    )
    criteria = (
        "record: leave out records with the text and images of an earlier one; image: also those with an image of an "
        "earlier one; keep: leave out none (%(default)s). About 140 MB of memory for a million of either"
    )
    choices = f"{{{','.join(DUPLICATES)}}}"
    add("--duplicates", choices=(*DUPLICATES, *FORMER_NAMES), metavar=choices, default=DUPLICATES[0], help=criteria)
    near = "treat images that look the same as equal, such as resized or re-encoded ones"
    add("--near-duplicates", action="store_true", help=f"{near}; OUTPUT-dropped.jsonl says what each is a copy of")
    add("--workers", type=_positive_int, metavar="N", help="number of processes (default: one per core)")
    add("--cache-dir", help="folder of the cache (default: vlm in Hugging Face's cache folder)")
    add("--force", action="store_true", help="replace an existing OUTPUT")
    add("--dry-run", action="store_true", help="report what would be removed, but write nothing")
    return parser


def _positive_int(text: str) -> int:
    """Parse a positive integer of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1 is needed")
    return int(text)
