"""The subcommand `vlm predict`: one prompt, or a file of records.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm.cli.model_options import add_loading_options
from vlm.cli.record_options import add_question_options, check_question_options, source_config
from vlm.config.shown import PresentableParser, printable

if TYPE_CHECKING:
    from vlm.inference.predict import Predictor


def main(argv: Sequence[str]) -> None:
    """`vlm predict CHECKPOINT --image F --prompt T`, or `--input RECORDS --output TABLE`."""
    purpose = "Ask a model with prediction heads: about one prompt, or about every record of a file."
    parser = PresentableParser("vlm predict", description=purpose)
    parser.add_argument("checkpoint", help="a head run's folder `final`, or a name on the Hub")
    prompt = "the question, as it was asked in training; <image> says where an image stands"
    add_question_options(parser, prompt, "preds.csv or preds.jsonl")
    add_loading_options(parser, quantized=False)
    args = parser.parse_args(argv)
    try:
        check_question_options(args)
        _predict_file(args) if args.input else _predict_one(args)
    except KeyboardInterrupt:
        sys.exit("\nvlm predict: stopped; the same command resumes it")


def _load_predictor(args: argparse.Namespace) -> "Predictor":
    from transformers.utils.logging import disable_progress_bar

    from vlm.inference.predict import Predictor

    disable_progress_bar()
    return Predictor.load(
        args.checkpoint, device=args.device, dtype=args.dtype, base=args.base, trust_remote_code=args.trust_remote_code,
        max_image_tokens=args.max_image_tokens,
    )  # fmt: skip


def _predict_one(args: argparse.Namespace) -> None:
    """Print the prediction of each head for one prompt, with a bar for each label."""
    from vlm.inference.generate import check_videos, load_images, user_turn

    images = load_images(args.image)
    check_videos(args.video, args.max_frames)
    user_turn(args.prompt, len(images), [()] * len(args.video))
    predictor = _load_predictor(args)
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
    """Write the table of predictions, and print metrics where the records have labels."""
    from vlm.assembly.adapter_base import fingerprint
    from vlm.assembly.adapter_folder import local_folder
    from vlm.data.cache import resolve_cache_folder
    from vlm.evaluation.predict_file import predict_file

    config = source_config(args)
    predictor = _load_predictor(args)
    result = predict_file(
        predictor, config, args.output, cache=resolve_cache_folder(None),
        fingerprint=fingerprint(local_folder(args.checkpoint)), batch_size=args.batch_size,
        num_workers=args.num_workers, max_frames=args.max_frames, overwrite=args.overwrite,
    )  # fmt: skip
    if result.metrics_text:
        print(printable(result.metrics_text))
    bad = f"; {result.bad} could not be read, column error says why" if result.bad else ""
    print(f"{result.records:,} records: {args.output}{bad}")
