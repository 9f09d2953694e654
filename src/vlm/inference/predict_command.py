"""The subcommand `vlm predict`: one prompt, or a file of records.

What imports torch is imported when the command has been understood.
"""

import argparse
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from vlm.adapters.merge import add_base_option
from vlm.config.schema import DatasetConfig, SourceConfig

KINDS = (".csv", ".jsonl")
"""What an output may end in."""


def parser() -> argparse.ArgumentParser:
    """What `vlm predict` takes."""
    purpose = "Ask a model with prediction heads: about one prompt, or about every record of a file."
    found = argparse.ArgumentParser("vlm predict", description=purpose)
    found.add_argument("checkpoint", help="a head run's folder `final`, or a name on the Hub")
    one = found.add_argument_group("one prompt")
    one.add_argument("--prompt", help="the question, as it was asked in training; <image> says where a picture stands")
    one.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    one.add_argument("--video", action="append", default=[], metavar="FILE", help="a video; may be repeated")
    many = found.add_argument_group("a file of records")
    many.add_argument("--input", metavar="FILE", help="records, of the forms and kinds of files that training reads")
    many.add_argument("--output", type=Path, metavar="FILE", help="what is written: preds.csv or preds.jsonl")
    many.add_argument("--format", metavar="FORM", help="of the records; default: llava, of tables labelled")
    many.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of that form: prompt='Which digit?'",
    )
    many.add_argument("--image-folder", "--image_folder", metavar="FOLDER", help="what their paths are relative to")
    many.add_argument("--system-prompt", metavar="TEXT", help="said first, as dataset.system_prompt was in training")
    many.add_argument("--batch-size", type=int, default=16, metavar="N", help="records at a time (%(default)s)")
    many.add_argument("--num-workers", type=int, default=2, metavar="N", help="processes that read (%(default)s)")
    many.add_argument("--overwrite", action="store_true", help="replace what is there, or was begun")
    found.add_argument("--max-frames", type=int, default=DatasetConfig.max_frames, metavar="N", help="of a video")
    found.add_argument("--device", default=None, help="cuda, cpu …; a GPU where there is one")
    found.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add_base_option(found)
    found.add_argument("--trust-remote-code", action="store_true", help="let code out of the checkpoint run")
    return found


def main(words: Sequence[str]) -> None:
    """`vlm predict CHECKPOINT --image F --prompt T`, or `--input RECORDS --output TABLE`."""
    args = parser().parse_args(words)
    try:
        check(args)
        _predict_file(args) if args.input else _predict_one(args)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm predict: {error}")
    except KeyboardInterrupt:
        sys.exit("\nvlm predict: stopped; the same command goes on with it")


def check(args: argparse.Namespace) -> None:
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
    if args.input and not Path(args.input).exists() and "://" not in args.input:
        raise ValueError(f"--input {args.input}: no such file (seen from {Path.cwd()})")
    if args.output is not None:
        need_new(args.output, overwrite=args.overwrite)
    if args.image_folder and not Path(args.image_folder).is_dir():
        raise ValueError(f"--image-folder {args.image_folder}: no such folder (seen from {Path.cwd()})")
    for name in ("batch_size", "max_frames"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if args.num_workers < 0:
        raise ValueError(f"--num-workers {args.num_workers}: 0 or more is needed")


def need_new(output: Path, *, overwrite: bool) -> None:
    """Raise ValueError where a table cannot be written to a path, or would replace what is there."""
    if output.suffix not in KINDS:
        raise ValueError(f"--output {output}: it must end in {' or '.join(KINDS)}")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; name another output, or give --overwrite")


def options_of(form: str, words: Sequence[str]) -> dict[str, Any]:
    """The options of a form of records, out of `NAME=VALUE` with values as YAML has them.

    Raises:
        ValueError: a word is none, or the form does not take it.
    """
    from omegaconf import OmegaConf

    from vlm.data.formats import reader_of

    known = [p.name for p in signature(reader_of(form)).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for word in words:
        name, equals, _ = word.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--option {word}: NAME=VALUE is needed; {form} takes {', '.join(known) or 'none'}")
    found: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(words)))
    return found


def _loaded(args: argparse.Namespace) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from vlm.inference.predict import Predictor

    disable_progress_bar()
    return Predictor.load(
        args.checkpoint, device=args.device, dtype=args.dtype, base=args.base, trust_remote_code=args.trust_remote_code
    )


def _predict_one(args: argparse.Namespace) -> None:
    """Print what each head says of a prompt, with a bar for each label."""
    from vlm.inference.generate import check_videos, opened, user_turn

    images = opened(args.image)
    check_videos(args.video, args.max_frames)
    user_turn(args.prompt, len(images), [()] * len(args.video))
    predictor = _loaded(args)
    found = predictor.predict(args.prompt, images, args.video, max_frames=args.max_frames)
    for name, said in (found if isinstance(found, dict) else {predictor.heads[0].name: found}).items():
        print(f"{name}: {said.prediction}" + (f"  (score {said.score:.4f})" if said.probabilities else ""))
        for label, chance in sorted(said.probabilities.items(), key=lambda one: -one[1])[:20]:
            print(f"  {chance:7.2%}  {'█' * round(30 * chance):<30}  {label}")


def _predict_file(args: argparse.Namespace) -> None:
    """Write a table, and print measures where the records have labels."""
    from vlm.adapters.base import fingerprint
    from vlm.adapters.folder import local_folder
    from vlm.data.cache import cache_folder
    from vlm.data.formats import FORMATS
    from vlm.inference.predict_file import predict_file

    form = args.format or ("llava" if Path(args.input).suffix in (".json", ".jsonl") else "labelled")
    if form not in FORMATS and ":" not in form:
        raise ValueError(f"--format {form}: allowed are {', '.join(FORMATS)}, or package.module:function for your own")
    config = SourceConfig(
        path=args.input, format=form, options=options_of(form, args.option), image_folder=args.image_folder,
        system_prompt=args.system_prompt,
    )  # fmt: skip
    predictor = _loaded(args)
    found = predict_file(
        predictor, config, args.output, cache=cache_folder(None),
        fingerprint=fingerprint(local_folder(args.checkpoint)), batch_size=args.batch_size,
        num_workers=args.num_workers, max_frames=args.max_frames, overwrite=args.overwrite,
    )  # fmt: skip
    if found.measures:
        print(found.measures)
    bad = f"; {found.bad} could not be read, column error says why" if found.bad else ""
    print(f"{found.records:,} records: {args.output}{bad}")
