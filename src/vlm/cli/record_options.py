"""Options of all commands that run a model on a question or a file of records.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from vlm.config.dataset_schema import DatasetConfig, SourceConfig
from vlm.config.named import permit_names
from vlm.inference.resumable_table import SUFFIXES, check_output


def add_question_options(parser: argparse.ArgumentParser, prompt: str, output: str) -> None:
    """Add options for one question or a file of them: what a prompt is, and examples of the file that is written."""
    question = parser.add_argument_group("one question")
    question.add_argument("--prompt", metavar="TEXT", help=prompt)
    question.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image file; repeat for several"
    )
    question.add_argument(
        "--video", action="append", default=[], metavar="FILE", help="a video file; repeat for several"
    )
    group = parser.add_argument_group("a file of records")
    group.add_argument("--input", metavar="FILE", help="a file of records in any training format")
    group.add_argument("--output", type=Path, metavar="FILE", help=f"the file to write: {output}")
    add_reading_options(group)
    add_max_frames_option(parser)


def add_max_frames_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the number of frames read from a video."""
    purpose = "most frames per video, evenly spaced (%(default)s)"
    parser.add_argument("--max-frames", type=int, default=DatasetConfig.max_frames, metavar="N", help=purpose)


def add_reading_options(group: "argparse._ArgumentGroup", *, writes: bool = True) -> None:
    """Add options of how a file of records is read; `writes`: those of a command that writes a row for each, too."""
    option = "an option of that format, such as prompt='Which digit?'; may be repeated"
    group.add_argument(
        "--format", metavar="FORMAT", help="record format (default: llava; labelled for CSV and other tables)"
    )
    group.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=option)
    group.add_argument("--image-folder", metavar="FOLDER", help="folder that image paths are relative to")
    rate = "frames per second of video, up to --max-frames (default: as many as it allows)"
    group.add_argument("--fps", type=float, metavar="N", help=rate)
    links = "follow symbolic links that lead out of the image folder"
    group.add_argument("--follow-links", action="store_true", help=links)
    group.add_argument("--system-prompt", metavar="TEXT", help="system prompt, as dataset.system_prompt in training")
    if not writes:
        return
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="records per batch (%(default)s)")
    group.add_argument(
        "--num-workers", type=int, default=2, metavar="N", help="worker processes that read records (%(default)s)"
    )
    group.add_argument("--overwrite", action="store_true", help="replace existing or unfinished output")


def check_question_options(args: argparse.Namespace, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raise ValueError, before anything is loaded, where options contradict each other or are out of bounds.

    `suffixes` are those of an output.
    """
    if (args.input is None) == (args.prompt is None):
        raise ValueError("give --prompt for one question, or --input and --output for a file of records")
    if (args.input is None) != (args.output is None):
        raise ValueError(f"{'--output' if args.input else '--input'} is missing: --input and --output go together")
    if args.input and (args.image or args.video):
        raise ValueError("--image and --video go with --prompt; a file of records names its own images")
    check_reading_options(args)
    if args.output is not None:
        check_output(args.output, overwrite=args.overwrite, suffixes=suffixes)


def check_reading_options(args: argparse.Namespace, key: str = "--input") -> None:
    """Raise ValueError if a file is missing or a number is too small; `key`: the option of the file of records."""
    if args.input and not Path(args.input).exists() and "://" not in args.input:
        raise ValueError(f"{key} {args.input}: no such file in {Path.cwd()}")
    if args.image_folder and not Path(args.image_folder).is_dir():
        raise ValueError(f"--image-folder {args.image_folder}: no such folder in {Path.cwd()}")
    for name in ("batch_size", "max_frames"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if args.fps is not None and args.fps <= 0:
        raise ValueError(f"--fps {args.fps}: a number above 0 is needed")
    if getattr(args, "num_workers", 0) < 0:
        raise ValueError(f"--num-workers {args.num_workers}: 0 or more is needed")


def source_config(args: argparse.Namespace) -> SourceConfig:
    """Return the source of records that a command names; the values of its reader's options are YAML.

    Raises:
        ValueError: the format is unknown, an option is malformed, or the format does not take the option.
    """
    from omegaconf import OmegaConf

    from vlm.data.records.formats import FORMATS, get_reader
    from vlm.data.records.paths import JSON_SUFFIXES, split_suffix

    name = args.format or ("llava" if split_suffix(args.input)[0] in JSON_SUFFIXES else "labelled")
    if name not in FORMATS and ":" not in name:
        raise ValueError(f"--format {name}: allowed are {', '.join(FORMATS)}, or package.module:function for your own")
    permit_names([name])
    known = [p.name for p in signature(get_reader(name)).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for word in args.option:
        key, equals, _ = word.partition("=")
        if not equals or key not in known:
            raise ValueError(f"--option {word}: NAME=VALUE is needed; {name} takes {', '.join(known) or 'none'}")
    options: Any = OmegaConf.to_container(OmegaConf.from_dotlist(args.option))
    return SourceConfig(
        path=args.input,
        format=name,
        options=options,
        image_folder=args.image_folder,
        follow_links=args.follow_links,
        system_prompt=args.system_prompt,
        fps=args.fps,
    )
