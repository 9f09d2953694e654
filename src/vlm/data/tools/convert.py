"""`vlm data convert`: convert annotations of many kinds to records of LLaVA's form or chat messages.

To add a conversion, write a generator `(source, context, **options)` of records that a reader of `formats.FORMATS`
takes, and add it to `CONVERSIONS`; a record that cannot be used is yielded as a `BadSample` with the reason. Its
keyword parameters are options of the command; a new one needs a line in `convert_options.OPTIONS`.
"""

import argparse
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from types import MappingProxyType
from typing import Any

import msgspec
from tqdm import tqdm

from vlm.config.model_schema import Options
from vlm.config.shown import PresentableParser, presentable, printable
from vlm.data.cache import resolve_cache_folder
from vlm.data.records.fields import label_record
from vlm.data.records.formats import FORMATS
from vlm.data.records.guess import Guess, guess_form, with_hint
from vlm.data.records.layout import find_layout
from vlm.data.records.links import check_links
from vlm.data.records.open import stream_records
from vlm.data.records.paths import JSON_SUFFIXES, split_suffix
from vlm.data.sample import BadSample, Record, Sample
from vlm.data.surrogates import HALF_PAIR, find_surrogate
from vlm.data.tools.convert_options import OPTIONS, option_flag
from vlm.data.tools.corpora import coco_captions, conceptual_captions, decode_json_file, vqa
from vlm.data.tools.detections import (
    coco_detections,
    has_boxes_alone,
    label_studio_boxes,
    refcoco,
)
from vlm.data.tools.exports import ConversionContext, label_studio, ubiai
from vlm.data.tools.forms import FORMS, is_image_moved_by_llava
from vlm.data.tools.verdicts import parse_option
from vlm.data.tools.write import OUTPUT_NAMES, SHARD_SIZE, RecordWriter, make_writer

STRUCTURE_KEYS = ("id", "image", "images", "video", "videos", "conversations", "messages", "objects", "system",
                  "system_prompt")  # fmt: skip
"""Keys that a form defines; other keys of records in LLaVA's form or of chat messages are kept unchanged."""
URL_COLUMN = "a table's header that is a URL"
STRING_CONVERSATIONS = "conversations of strings"
BOX_RESULTS = "results of Label Studio that are rectangles or key points alone"
MINICPM_IMAGES = "conversations of roles, and several images by name"
"""Used instead of keys if these do not tell the kind of a record."""


def read_plain_records(
    source: str, context: ConversionContext, *, split: str = "train", subset: str | None = None
) -> Iterator[object]:
    """Read records that a reader takes unchanged, from any file that `records.open` opens."""
    return stream_records(
        source, context.cache, split=split, subset=subset, allow_pipe=True, follow_links=context.follow_links
    )


@dataclass(frozen=True)
class Conversion:
    """A kind of annotations that can be converted.

    Attributes:
        records: yields records.
        form: the format whose reader takes them, a name of `FORMATS`.
        identifying_keys: keys of its first record, by which the kind is recognised.
        is_list: whether the file is a list of records; otherwise the file itself has the keys.
    """

    records: Callable[..., Iterator[object]]
    form: str
    identifying_keys: frozenset[str]
    is_list: bool = True

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword parameters of `records` and of the reader."""
        functions = (FORMATS[self.form], self.records)
        return {name: option for function in functions for name, option in keyword_parameters(function).items()}


CONVERSIONS = {
    "llava": Conversion(read_plain_records, "llava", frozenset({"conversations"})),
    "messages": Conversion(read_plain_records, "messages", frozenset({"messages"})),
    "caption": Conversion(read_plain_records, "caption", frozenset({"image", "caption"})),
    "question": Conversion(read_plain_records, "question", frozenset({"question", "answer"})),
    "head": Conversion(read_plain_records, "head", frozenset({STRING_CONVERSATIONS})),
    "labelled": Conversion(read_plain_records, "labelled", frozenset({"prompt", "label"})),
    "alpaca": Conversion(read_plain_records, "alpaca", frozenset({"instruction", "output"})),
    "cauldron": Conversion(read_plain_records, "cauldron", frozenset({"texts"})),
    "minicpm": Conversion(read_plain_records, "minicpm", frozenset({MINICPM_IMAGES})),
    "conceptual-captions": Conversion(conceptual_captions, "caption", frozenset({URL_COLUMN})),
    "coco-captions": Conversion(coco_captions, "caption", frozenset({"images", "annotations"}), is_list=False),
    "vqa": Conversion(vqa, "llava", frozenset({"questions"}), is_list=False),
    "ubiai": Conversion(ubiai, "llava", frozenset({"documentName"})),
    "label-studio": Conversion(label_studio, "question", frozenset({"data", "annotations"})),
    "coco-detections": Conversion(
        coco_detections, "llava", frozenset({"images", "annotations", "categories"}), is_list=False
    ),
    "refcoco": Conversion(refcoco, "llava", frozenset({"ref_id", "ann_id", "sentences"})),
    "label-studio-boxes": Conversion(label_studio_boxes, "llava", frozenset({BOX_RESULTS})),
}


def keyword_parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters of a function."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}


def detect_conversion(
    source: str, cache: Path, *, follow_links: bool = False, options: Mapping[str, object] = MappingProxyType({})
) -> str:
    """Return the conversion that fits a file, by the keys of its first record; ValueError unless there is one.

    `options` are those of the command: where the keys fit nothing, an option that one reader alone has tells the kind.
    """
    keys, is_list, guess = _first_keys(source, cache, follow_links=follow_links)
    fits = [name for name, kind in CONVERSIONS.items() if kind.is_list == is_list and kind.identifying_keys <= keys]
    specific = [name for name in fits if not any(is_more_specific(other, name) for other in fits)]
    fits = specific if len(specific) == 1 else fits
    if not fits and guess is not None and guess.format in CONVERSIONS and guess.options.items() <= options.items():
        return guess.format
    if not fits and len(named := _kinds_of_options(options)) == 1:
        return named[0]
    if len(fits) != 1:
        reason = (
            f"may be {' or '.join(fits)}" if fits else f"are of no known kind (keys: {', '.join(sorted(keys)):.200})"
        )
        hint = f"; {guess.hint('convert', given=options)}" if guess is not None and not fits else ""
        kinds = ", ".join(CONVERSIONS)
        raise ValueError(f"{source}: its records {reason}{hint}; choose a kind with --from: {kinds}")
    return fits[0]


def _kinds_of_options(options: Mapping[str, object]) -> list[str]:
    """Return the kinds of plain records whose reader has all options."""
    plain = {name: kind for name, kind in CONVERSIONS.items() if kind.records is read_plain_records}
    return [name for name, kind in plain.items() if options.keys() <= kind.options.keys()]


def is_more_specific(name: str, other: str) -> bool:
    """Return whether a conversion is recognised by all keys of another one, and more."""
    return CONVERSIONS[other].identifying_keys < CONVERSIONS[name].identifying_keys


def _first_keys(source: str, cache: Path, *, follow_links: bool) -> tuple[set[str], bool, Guess | None]:
    """Return the keys of the first record, or of a file that is no list; whether it is one; and a guess of its form."""
    if split_suffix(source)[0] in JSON_SUFFIXES and Path(source).is_file():
        try:
            find_layout(Path(source))
        except ValueError:
            keys = _object_keys(Path(source))
            if not any(kind.identifying_keys <= keys for kind in CONVERSIONS.values() if not kind.is_list):
                raise
            return keys, False, None
    first = next(iter(stream_records(source, cache, allow_pipe=True, follow_links=follow_links)), None)
    if not isinstance(first, dict):
        return set(), True, None
    turns = first.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return {STRING_CONVERSATIONS}, True, None
    if has_boxes_alone(first):
        return {BOX_RESULTS}, True, None
    if source.endswith(".tsv") and len(first) == 2 and any(key.startswith(("http://", "https://")) for key in first):
        return {URL_COLUMN}, True, None
    return {key for key, value in first.items() if value is not None}, True, guess_form(first)


def _object_keys(path: Path) -> set[str]:
    """Return the keys of a file that is one JSON object; none of any other file."""
    try:
        return set(decode_json_file(path, dict[str, msgspec.Raw]))
    except ValueError:
        return set()


@dataclass(frozen=True)
class RecordConverter:
    """Reads records and writes them in one of `FORMS`; all keys but `dropped_keys` are kept, none if that is None."""

    read: Callable[[Record, Path], Sample]
    write: Callable[[Sample, Path], Record]
    folder: Path
    dropped_keys: frozenset[str] | None
    format: str
    options: Mapping[str, object]
    follow_links: bool = False

    def convert_record(self, item: Any, number: int) -> tuple[Sample, Record]:
        """Return a record as a sample and in the other form; a record without an id gets its index."""
        if isinstance(item, BadSample):
            raise item
        try:
            sample = self.read(item, self.folder)
        except BadSample as error:
            raise with_hint(error, item, self.format, self.options, "convert") from None
        if not self.follow_links:
            check_links(sample, self.folder)
        if sample.id == "?":
            sample = replace(sample, id=str(number))
        record = self.write(sample, self.folder)
        if self.dropped_keys is not None:
            record |= {key: value for key, value in item.items() if key not in self.dropped_keys and value is not None}
            if (place := find_surrogate(record)) is not None:
                raise BadSample(sample.id, f"`{place}` {HALF_PAIR}")
        return sample, record


def convert(
    source: str, output: str, conversion: str, *, to: str = "llava", image_folder: str | None = None,
    cache: Path, options: Mapping[str, object] | None = None, on_bad: str = "error", embed_images: bool = False,
    shard_size: int | None = None, force: bool = False, follow_links: bool = False,
) -> str:  # fmt: skip
    """Convert records from one file to another, one at a time; return a summary.

    Args:
        source: the file or data set of records.
        output: the file to write, whose name tells its kind, see `write.OUTPUT_NAMES`.
        conversion: a name of `CONVERSIONS`.
        to: a name of `FORMS`.
        image_folder: what paths of images are relative to; None: the folder of `source`.
        cache: the cache's folder, for the index of a `.json` file.
        options: of the conversion, and of the reader of its records.
        on_bad: `error` stops at a record that cannot be used; `skip` lists them in `OUTPUT.skipped.jsonl`.
        embed_images: see `write.make_writer`.
        shard_size: see `write.make_writer`.
        force: replaces what is there.
        follow_links: follows links that lead out of the folder of images or records.

    Raises:
        ValueError: the arguments are invalid, or a record cannot be used.
    """
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output}: that is the input; choose another output")
    folder = _resolve_image_folder(source, image_folder)
    kind = CONVERSIONS[conversion]
    kind_options, reader_options = split_options(conversion, options or {})
    dropped_keys = frozenset((*STRUCTURE_KEYS, str(reader_options.get("key")))) if kind.form in FORMS else None
    form = RecordConverter(
        partial(FORMATS[kind.form], **reader_options),
        FORMS[to],
        folder,
        dropped_keys,
        kind.form,
        reader_options,
        follow_links,
    )
    writer = make_writer(output, folder, embed_images=embed_images, shard_size=shard_size, force=force)
    tally = ConversionTally()
    records = kind.records(source, ConversionContext(folder, cache, tally.left_out, follow_links), **kind_options)
    skipped = Path(f"{output.rstrip('/')}.skipped.jsonl")
    _write_all(records, form, writer, skipped if on_bad == "skip" else None, tally)
    summary = [f"{writer.number} records written to {output}, with image paths relative to {folder}", *tally.describe()]
    if tally.num_bad:
        summary.append(f"{tally.num_bad} skipped, see {skipped}")
    else:
        skipped.unlink(missing_ok=True)  # of an earlier run
    if tally.num_moved and to == "llava":
        summary.append(f"{tally.num_moved} turns have their only image after text, which LLaVA's form reads before it")
    return "; ".join(summary)


def _resolve_image_folder(source: str, image_folder: str | None) -> Path:
    """Return the image folder: by default that of the records, or the working directory where they are in none."""
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"--image-folder {image_folder}: there is no such folder")
    path = Path(source if image_folder is None else image_folder)
    return path if path.is_dir() else path.parent if path.parent.is_dir() else Path()


@dataclass
class ConversionTally:
    """Items that gave no record, by reason; bad records and the first of them; turns whose image LLaVA's form moves."""

    left_out: Counter[str] = field(default_factory=Counter)
    num_bad: int = 0
    first: str = ""
    num_moved: int = 0

    def describe(self) -> list[str]:
        """Describe the items that were left out."""
        return [f"left out: {number} {items}" for items, number in self.left_out.items() if number]


def _write_all(
    records: Iterator[object], form: RecordConverter, writer: RecordWriter, skipped: Path | None, tally: ConversionTally
) -> None:
    """Write records; list those that cannot be used in the file `skipped`, or stop at the first where it is None."""
    journal: RecordWriter | None = None
    with writer, ExitStack() as stack:
        for number, item in enumerate(tqdm(records, "records", unit="record", disable=None)):
            try:
                sample, record = form.convert_record(item, number)
                writer.write(record)
                tally.num_moved += sum(map(is_image_moved_by_llava, sample.turns))
            except BadSample as error:
                tally.first = tally.first or f"{label_record(number, error.sample_id)}: {error.reason}"
                if skipped is None:
                    raise ValueError(f"{tally.first}; --on-bad skip lists such records and continues") from error
                if journal is None:
                    journal = stack.enter_context(make_writer(str(skipped), skipped.parent, force=True))
                journal.write({"record": number, "id": error.sample_id, "reason": error.reason})
                tally.num_bad += 1
        if not writer.number:
            raise ValueError(f"no record to write; {'; '.join([*tally.describe(), tally.first])}")


def split_options(conversion: str, options: Mapping[str, object]) -> tuple[Options, Options]:
    """Divide options into those of the conversion and those of the reader; ValueError for an unknown or missing one."""
    kind = CONVERSIONS[conversion]
    known = kind.options
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"--from {conversion} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    if missing := [name for name, option in known.items() if option.default is option.empty and name not in options]:
        raise ValueError(f"--from {conversion} needs {', '.join(map(option_flag, missing))}")
    kind_options = {name: options[name] for name in keyword_parameters(kind.records) if name in options}
    return kind_options, {name: value for name, value in options.items() if name not in kind_options}


EXAMPLES = (
    "vlm data convert captions_val2017.json records.jsonl --from coco-captions --image-folder val2017",
    "vlm data convert questions.json records.jsonl --from vqa --annotations answers.json "
    "--image-pattern 'COCO_train2014_{image_id:012d}.jpg'",
    "vlm data convert records.jsonl shards/ --shard-size 1000",
)


def main(arguments: Sequence[str]) -> None:
    """`vlm data convert INPUT OUTPUT --from FORM`."""
    args = _parser().parse_args(arguments)
    options = {name: getattr(args, name) for name in (*OPTIONS, "group", "by_label") if getattr(args, name) is not None}
    cache = resolve_cache_folder(args.cache_dir)
    try:
        options |= dict(args.option)
        kind = args.conversion or detect_conversion(args.input, cache, follow_links=args.follow_links, options=options)
        print(printable(convert(
            args.input, args.output, kind, to=args.to, cache=cache,
            image_folder=args.image_folder, options=options, on_bad=args.on_bad,
            embed_images=args.embed_images, shard_size=args.shard_size, force=args.force,
            follow_links=args.follow_links,
        )))  # fmt: skip
    except (ValueError, OSError) as error:
        sys.exit(f"vlm data convert: {presentable(error)}")
    except KeyboardInterrupt:
        sys.exit("vlm data convert: stopped; nothing was written")


def _parser() -> argparse.ArgumentParser:
    kinds = f"Kinds (--from): {', '.join(CONVERSIONS)}."
    parser = PresentableParser(
        "vlm data convert",
        description="Convert annotations and records to a format that training reads.",
        epilog=fill(kinds, 100, break_on_hyphens=False),
        examples=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("input", metavar="INPUT", help=".json, .jsonl, .parquet, tar shards …; .tsv or .json of a kind")
    add("output", metavar="OUTPUT", help=OUTPUT_NAMES.replace("%", "%%"))
    told = "what INPUT is (default: recognised by its first record)"
    add("--from", "--format", dest="conversion", choices=CONVERSIONS, metavar="KIND", help=told)
    add("--to", choices=FORMS, default="llava", help="format of the records to write (default: %(default)s)")
    add("--image-folder", metavar="FOLDER", help="folder that paths are relative to (default: the folder of INPUT)")
    add("--follow-links", action="store_true", help="follow links that lead out of the folder of images or records")
    add("--embed-images", action="store_true", help=".parquet: store the images in the file")
    add("--shard-size", type=int, metavar="N", help=f"samples per tar shard (default: {SHARD_SIZE})")
    bad = "what to do with a record that cannot be used; skip lists it in OUTPUT.skipped.jsonl (default: %(default)s)"
    add("--on-bad", choices=("error", "skip"), default="error", help=bad)
    add("--force", action="store_true", help="replace an existing OUTPUT")
    add("--cache-dir", help="folder of the cache (default: vlm in Hugging Face's cache folder)")
    add = parser.add_argument_group("options of particular kinds").add_argument
    for name, (metavar, text) in OPTIONS.items():
        add(option_flag(name), metavar=metavar, help=text.replace("%", "%%"))
    add("--no-group", dest="group", action="store_false", default=None, help="vqa: write one record per question")
    each = "coco-detections: a record for each label of an image"
    add("--by-label", dest="by_label", action="store_true", default=None, help=each)
    other = "any other option of the reader, such as caption_key=text; may be repeated"
    add("--option", action="append", default=[], type=_parse_option, metavar="NAME=VALUE", help=other)
    return parser


def _parse_option(text: str) -> tuple[str, object]:
    name, sign, _ = text.partition("=")
    if not (sign and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as NAME=VALUE")
    return parse_option(text)
