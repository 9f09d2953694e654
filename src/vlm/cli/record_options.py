"""What commands take that ask a model about a file of records: which records, how they are read, what is written.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from vlm.config.schema import DatasetConfig, SourceConfig
from vlm.inference.resumable_table import check_output


def add_record_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Let a command take a file of records; `output` names examples of what it writes."""
    group = parser.add_argument_group("a file of records")
    group.add_argument("--input", metavar="FILE", help="records, of the forms and kinds of files that training reads")
    group.add_argument("--output", type=Path, metavar="FILE", help=f"what is written: {output}")
    add_reading_options(group)
    parser.add_argument(
        "--max-frames", "--max_frames", type=int, default=DatasetConfig.max_frames, metavar="N", help="of a video"
    )


def add_reading_options(group: Any) -> None:
    """How a file of records is read, into a parser's group."""
    group.add_argument("--format", metavar="FORM", help="of the records; default: llava, of tables labelled")
    group.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of that form: prompt='Which digit?'"
    )
    group.add_argument("--image-folder", "--image_folder", metavar="FOLDER", help="what their paths are relative to")
    group.add_argument("--system-prompt", metavar="TEXT", help="said first, as dataset.system_prompt was in training")
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="records at a time (%(default)s)")
    group.add_argument("--num-workers", type=int, default=2, metavar="N", help="processes that read (%(default)s)")
    group.add_argument("--overwrite", action="store_true", help="replace what is there, or was begun")


def check_record_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before anything is loaded.

    Raises:
        ValueError: options that do not go together, or are out of bounds.
    """
    if (args.input is None) == (args.prompt is None):
        raise ValueError("give --prompt for one question, or --input and --output for a file of records")
    if (args.input is None) != (args.output is None):
        raise ValueError("--input and --output belong together")
    if args.input and (args.image or args.video):
        raise ValueError("--image and --video belong to --prompt; a file of records names its own")
    check_reading_options(args)
    if args.output is not None:
        check_output(args.output, overwrite=args.overwrite)


def check_reading_options(args: argparse.Namespace, key: str = "--input") -> None:
    """Refuse a file that is not there and numbers out of bounds; `key` is the option that names the file.

    Raises:
        ValueError: with the option, and what is needed.
    """
    if args.input and not Path(args.input).exists() and "://" not in args.input:
        raise ValueError(f"{key} {args.input}: no such file (seen from {Path.cwd()})")
    if args.image_folder and not Path(args.image_folder).is_dir():
        raise ValueError(f"--image-folder {args.image_folder}: no such folder (seen from {Path.cwd()})")
    for name in ("batch_size", "max_frames"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if args.num_workers < 0:
        raise ValueError(f"--num-workers {args.num_workers}: 0 or more is needed")


def source_config(args: argparse.Namespace) -> SourceConfig:
    """The records that a command names.

    Raises:
        ValueError: their form is unknown, or does not take an option.
    """
    from vlm.data.records.formats import FORMATS

    form = args.format or ("llava" if Path(args.input).suffix in (".json", ".jsonl") else "labelled")
    if form not in FORMATS and ":" not in form:
        raise ValueError(f"--format {form}: allowed are {', '.join(FORMATS)}, or package.module:function for your own")
    return SourceConfig(
        path=args.input, format=form, options=parse_reader_options(form, args.option), image_folder=args.image_folder,
        system_prompt=args.system_prompt,
    )  # fmt: skip


def parse_reader_options(form: str, assignments: Sequence[str]) -> dict[str, Any]:
    """The options of a form of records, out of `NAME=VALUE` with values as YAML has them.

    Raises:
        ValueError: a word is none, or the form does not take it.
    """
    from omegaconf import OmegaConf

    from vlm.data.records.formats import get_reader

    known = [p.name for p in signature(get_reader(form)).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for word in assignments:
        name, equals, _ = word.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--option {word}: NAME=VALUE is needed; {form} takes {', '.join(known) or 'none'}")
    found: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(assignments)))
    return found
