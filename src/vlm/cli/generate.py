"""The subcommand `vlm generate`: one question, or a file of records.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
import sys
from collections.abc import Sequence

from vlm.checks.checkpoint import check_checkpoint
from vlm.cli.model_options import add_generation_options, load_model, open_conversation, read_inference_settings
from vlm.cli.record_options import add_question_options, check_question_options, source_config
from vlm.config.schema import InferenceConfig
from vlm.config.shown import PresentableParser, printable


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm generate`."""
    purpose = "Ask a model one question about images or videos, or every question in a file."
    examples = (
        'vlm generate outputs/smol-finetune/final --image cat.png --prompt "What is this?"',
        "vlm generate outputs/smol-finetune/final --input questions.jsonl --image-folder images --output answers.jsonl",
    )
    parser = PresentableParser("vlm generate", "vlm generate CHECKPOINT [options]", purpose, examples=examples)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder `final`, or a model on the Hub")
    prompt = "the question; <image> and <video> mark where they go"
    add_question_options(parser, prompt, "answers.jsonl or answers.csv")
    add_generation_options(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm generate CHECKPOINT --image F --prompt T`, or `--input RECORDS --output TABLE`."""
    args = make_parser().parse_intermixed_args(argv)
    try:
        check_question_options(args)
        settings = read_inference_settings(args)
        check_checkpoint(args.checkpoint, heads=False)
        _generate_file(args, settings) if args.input else _generate_one(args, settings)
    except KeyboardInterrupt:
        sys.exit("\nvlm generate: stopped" + ("; the same command resumes it" if args.input else ""))


def _generate_one(args: argparse.Namespace, settings: InferenceConfig) -> None:
    """Print the answer piece by piece."""
    from vlm.inference.prompts import check_videos, load_images, user_turn

    images = load_images(args.image)
    check_videos(args.video, args.max_frames)  # refuse bad input before the model loads
    user_turn(args.prompt, len(images), [()] * len(args.video))
    for piece in open_conversation(args, settings).ask(args.prompt, images, args.video):
        print(printable(piece), end="", flush=True)
    print()


def _generate_file(args: argparse.Namespace, settings: InferenceConfig) -> None:
    """Write the table of answers, and print how many records it has."""
    from vlm.assembly.adapter_folder import local_folder
    from vlm.checks.weights import fingerprint
    from vlm.data.cache import json_digest, resolve_cache_folder
    from vlm.evaluation.output import read_first_samples
    from vlm.inference.generate_file import generate_file

    config = source_config(args)
    read_first_samples(config, "--input")
    model = load_model(args, settings)
    loaded_as = fingerprint(local_folder(args.checkpoint)), args.dtype, args.quantization
    rows = generate_file(
        model,
        config,
        args.output,
        settings,
        cache=resolve_cache_folder(None),
        fingerprint=json_digest(loaded_as),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        max_frames=args.max_frames,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    bad = sum(bool(row["error"]) for row in rows)
    note = f"; {bad} were not asked, the column error says why" if bad else ""
    print(f"{len(rows):,} records: {args.output}{note}")
