"""The subcommand `vlm predict`: one prompt, or a file of records; predictions, or vectors of a head that embeds.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm.checks.checkpoint import check_checkpoint
from vlm.cli.model_options import add_loading_options
from vlm.cli.progress_note import tell
from vlm.cli.record_options import add_question_options, check_question_options, source_config
from vlm.config.shown import PresentableParser, printable
from vlm.inference.resumable_table import SUFFIXES

if TYPE_CHECKING:
    from vlm.inference.embed import Embedder
    from vlm.inference.predict import Predictor


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm predict`."""
    purpose = (
        "Predict labels, numbers or rankings with a model that has prediction heads, for one prompt or every record of "
        "a file. An embedding head writes vectors."
    )
    examples = (
        'vlm predict outputs/kinds/final --image cat.png --prompt "Which animal?"',
        "vlm predict outputs/kinds/final --input new.jsonl --image-folder images --output preds.csv",
    )
    parser = PresentableParser("vlm predict", "vlm predict CHECKPOINT [options]", purpose, examples=examples)
    checkpoint = "the folder `final` of a run with a head, or a model on the Hub"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=checkpoint)
    prompt = "the question, worded as in training; <image> marks where the image goes"
    add_question_options(parser, prompt, "preds.csv or preds.jsonl; for vectors .jsonl or .npy")
    group = parser.add_argument_group("embedding heads")
    side = "embed queries or documents, each with its own system prompt (default: document)"
    group.add_argument("--side", choices=("query", "document"), help=side)
    group.add_argument("--width", type=int, metavar="N", help="keep the first N numbers of each vector (default: all)")
    add_loading_options(parser, quantized=False)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm predict CHECKPOINT --image F --prompt T`, or `--input RECORDS --output TABLE`."""
    args = make_parser().parse_args(argv)
    try:
        check_question_options(args, (*SUFFIXES, ".npy"))
        check_checkpoint(args.checkpoint, heads=True)
        _predict_file(args) if args.input else _predict_one(args)
    except KeyboardInterrupt:
        sys.exit("\nvlm predict: stopped; the same command resumes it")


def _load(args: argparse.Namespace) -> "Predictor | Embedder":
    """Load the model.

    Raises:
        ValueError: options of vectors are given, and the model predicts.
    """
    tell(f"Loading {args.checkpoint}")
    from transformers.utils.logging import disable_progress_bar

    from vlm.inference.embed import load_with_heads
    from vlm.inference.predict import Predictor

    disable_progress_bar()
    loaded = load_with_heads(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        base=args.base,
        trust_remote_code=args.trust_remote_code,
        max_image_tokens=args.max_image_tokens,
    )
    for name in ("side", "width"):
        if isinstance(loaded, Predictor) and (value := getattr(args, name)) is not None:
            raise ValueError(f"--{name} {value}: {args.checkpoint} has no embedding head; leave it out")
    return loaded


def _predict_one(args: argparse.Namespace) -> None:
    """Print the prediction of each head for one prompt, with a bar for each label; or its vector, as JSON."""
    from vlm.inference.embed import Embedder
    from vlm.inference.prompts import check_videos, load_images, user_turn

    images = load_images(args.image)
    check_videos(args.video, args.max_frames)
    user_turn(args.prompt, len(images), [()] * len(args.video))
    predictor = _load(args)
    if isinstance(predictor, Embedder):
        (vector,) = predictor.embed(
            [args.prompt],
            [images],
            [args.video],
            side=args.side or "document",
            width=args.width,
            max_frames=args.max_frames,
            system_prompt=args.system_prompt,
        )
        print(json.dumps([float(f"{number:.9g}") for number in vector.tolist()]))
        return
    predictions = predictor.predict(
        args.prompt, images, args.video, max_frames=args.max_frames, system_prompt=args.system_prompt
    )
    if not isinstance(predictions, dict):
        predictions = {predictor.heads[0].name: predictions}
    for name, head in predictions.items():
        said = printable(f"{name}: {head.prediction}", single_line=True)
        print(said + (f"  (score {head.score:.4f})" if head.probabilities else ""))
        ranked = sorted(head.probabilities.items(), key=lambda item: -item[1])
        for label, probability in ranked[:20]:
            print(
                f"  {probability:7.2%}  {'█' * round(30 * probability):<30}  {printable(str(label), single_line=True)}"
            )


def _predict_file(args: argparse.Namespace) -> None:
    """Write the table of predictions, and print metrics where the records have labels; or write vectors."""
    from vlm.assembly.adapter_folder import local_folder
    from vlm.checks.weights import fingerprint
    from vlm.data.cache import resolve_cache_folder
    from vlm.evaluation.embed_file import embed_file
    from vlm.evaluation.output import read_first_samples
    from vlm.evaluation.predict_file import predict_file
    from vlm.inference.embed import Embedder

    config = source_config(args)
    read_first_samples(config, "--input")
    predictor = _load(args)
    place = {"cache": resolve_cache_folder(None), "fingerprint": fingerprint(local_folder(args.checkpoint))}
    options = {name: getattr(args, name) for name in ("batch_size", "num_workers", "max_frames", "overwrite")}
    if isinstance(predictor, Embedder):
        side = args.side or "document"
        rows = embed_file(predictor, config, args.output, side=side, width=args.width, **place, **options)
        bad = sum(bool(row["error"]) for row in rows)
        _print_summary(args, len(rows), bad, "their key error")
        return
    result = predict_file(predictor, config, args.output, **place, **options)
    if result.metrics_text:
        print(printable(result.metrics_text))
    _print_summary(args, result.records, result.bad, "the column error")


def _print_summary(args: argparse.Namespace, records: int, bad: int, column: str) -> None:
    unread = f"; {bad} could not be read, see {column}" if bad else ""
    print(f"{records:,} records: {args.output}{unread}")
