"""The subcommand `vlm average`: one checkpoint out of several of the same shape.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from vlm.cli.model_options import add_loading_options, load_model
from vlm.cli.record_options import add_max_frames_option, add_reading_options, check_reading_options, source_config
from vlm.config.derived import lower_is_better
from vlm.config.named import permit_names
from vlm.config.schema import InferenceConfig
from vlm.config.shown import PresentableParser, printable


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm average`."""
    purpose = "Average the weights of checkpoints of the same model, such as several runs from one start."
    examples = (
        "vlm average outputs/a/final outputs/b/final --out outputs/average",
        "vlm average outputs/a/final outputs/b/final --out outputs/soup --data val.json --image-folder images",
    )
    usage = "vlm average CHECKPOINT CHECKPOINT … --out FOLDER [options]"
    parser = PresentableParser("vlm average", usage, purpose, examples=examples)
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="runs' folders `final`, or models on the Hub"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to create")
    weights = "one weight per checkpoint, such as 2,1,1 (default: equal)"
    parser.add_argument("--weights", metavar="N,N", help=weights)
    greedy = parser.add_argument_group(
        "greedy average",
        "with --data: adds checkpoints from the best to the worst, and keeps each only if it improves the average",
    )
    greedy.add_argument("--data", dest="input", metavar="FILE", help="records to evaluate on, as for vlm eval --data")
    greedy.add_argument("--metric", default="loss", metavar="NAME", help="the metric to improve (%(default)s)")
    add_reading_options(greedy, writes=False)
    greedy.add_argument("--batch-size", type=int, default=16, metavar="N", help="records per batch (%(default)s)")
    greedy.add_argument(
        "--num-workers", type=int, default=2, metavar="N", help="worker processes that read records (%(default)s)"
    )
    longest = f"most tokens in an answer, for metrics of answers ({InferenceConfig.max_new_tokens})"
    greedy.add_argument("--max-new-tokens", type=int, default=InferenceConfig.max_new_tokens, metavar="N", help=longest)
    add_max_frames_option(parser)
    add_loading_options(parser, quantized=False)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm average CHECKPOINT CHECKPOINT … --out FOLDER [--data RECORDS --metric NAME]`."""
    args = make_parser().parse_args(argv)
    weights = None if args.weights is None else _numbers(args.weights)
    if args.input is None:
        from vlm.hub.averaging import average

        out = average(args.checkpoints, args.out, weights)
        print(printable(f"{out}: the average of {', '.join(args.checkpoints)}"))
        return
    if weights is not None:
        raise ValueError("--weights and --data: a greedy average weights all checkpoints equally; leave one out")
    check_reading_options(args, "--data")
    _average_greedily(args)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--weights {text}: one number per checkpoint is needed, separated by commas") from error


def _average_greedily(args: argparse.Namespace) -> None:
    from tabulate import tabulate

    from vlm.evaluation.text_metrics import ALL_METRICS, check_metrics
    from vlm.hub.averaging import average_greedily

    permit_names([args.metric])
    check_metrics([args.metric], ALL_METRICS, "--metric ")
    result = average_greedily(
        args.checkpoints, args.out, partial(_measure, args), lower_is_better=lower_is_better(args.metric)
    )
    rows = [(name, f"{score:.4g}", "yes" if name in result.members else "") for name, score in result.scores.items()]
    rows.append((str(args.out), f"{result.score:.4g}", ""))
    print(printable(tabulate(rows, ("checkpoint", args.metric, "in the average"), disable_numparse=True)))


def _measure(args: argparse.Namespace, folder: Path) -> float:
    """Return a checkpoint's score on the records of the command line."""
    from vlm.data.cache import resolve_cache_folder
    from vlm.evaluation.records import evaluate

    model = load_model(argparse.Namespace(**{**vars(args), "checkpoint": str(folder), "quantization": None}))
    with TemporaryDirectory() as answers:
        result = evaluate(
            model,
            source_config(args),
            [args.metric],
            Path(answers),
            InferenceConfig(max_new_tokens=args.max_new_tokens),
            cache=resolve_cache_folder(None),
            fingerprint="",
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            max_frames=args.max_frames,
        )
    score = result.scores[args.metric].value
    if score is None:
        raise ValueError(f"--metric {args.metric}: it is not defined for {args.input}; choose another metric")
    return score
