"""The subcommand `vlm compare-models`: what a model gained and forgot against another one.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.checks.checkpoint import check_checkpoint
from vlm.cli.model_options import add_loading_options, load_model
from vlm.cli.record_options import add_max_frames_option, add_reading_options, check_reading_options, source_config
from vlm.config.choices import ANSWER_METRICS
from vlm.config.dataset_schema import SourceConfig
from vlm.config.named import permit_names
from vlm.config.schema import InferenceConfig
from vlm.config.shown import PresentableParser, printable
from vlm.evaluation.output import check_references, resolve_output_folder
from vlm.evaluation.probe.write import NUM_QUESTIONS, write_probe

if TYPE_CHECKING:
    from vlm.data.sample import BadSample
    from vlm.evaluation.comparison.checkpoints import ComparedCheckpoint
    from vlm.evaluation.comparison.records import ComparedRecord
    from vlm.inference.generate import VisionLanguageModel

MAX_NEW_TOKENS = 64


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm compare-models`."""
    purpose = (
        "Show what a finetuned model gained and forgot: on your own records, on blank images, and on a small set of "
        "generated questions."
    )
    examples = (
        "vlm compare-models outputs/pretrain/final outputs/finetune/final --data val.json --image-folder images",
        "vlm compare-models outputs/pretrain/final outputs/finetune/final --data val.json --metrics exact_match,cider",
    )
    parser = PresentableParser(
        "vlm compare-models", "vlm compare-models BEFORE AFTER [options]", purpose, examples=examples
    )
    parser.add_argument(
        "before", metavar="BEFORE", help="the first model: a run's folder `final`, or a model on the Hub"
    )
    parser.add_argument("after", metavar="AFTER", help="the finetuned model, likewise")
    output = "folder for the results (default: eval/compare in AFTER's run)"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=output)
    group = parser.add_argument_group("records")
    data = "held-out records with reference replies; may be repeated"
    group.add_argument("--data", action="append", default=[], metavar="FILE", help=data)
    metrics = f"{', '.join(ANSWER_METRICS)}, or module:function (%(default)s)"
    group.add_argument("--metrics", default="exact_match", metavar="NAME,NAME", help=metrics)
    by = "also split results by this key of the records; may be repeated"
    group.add_argument("--by", action="append", default=[], metavar="KEY", help=by)
    group.add_argument(
        "--max-samples", type=int, metavar="N", help="use at most N records per file, drawn at random (default: all)"
    )
    probe = "generated questions per ability; 0 turns them off (%(default)s)"
    group.add_argument("--probe", type=int, default=NUM_QUESTIONS, metavar="N", help=probe)
    add_reading_options(group)
    add_max_frames_option(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="most tokens in an answer (%(default)s)"
    )
    add_loading_options(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm compare-models BEFORE AFTER --data RECORDS …`."""
    args = make_parser().parse_args(argv)
    try:
        _compare(args)
    except KeyboardInterrupt:
        sys.exit("\nvlm compare-models: stopped; the same command resumes it")


def _compare(args: argparse.Namespace) -> None:
    """Compare the models, and print what moved."""
    metrics, configs = _check(args)
    for name in (args.before, args.after):
        check_checkpoint(name, heads=False)
    folder = resolve_output_folder(args.after, "compare", args.output)

    from vlm.data.cache import json_digest, resolve_cache_folder
    from vlm.data.dataset import draw_records
    from vlm.data.encoding.sample_encoder import SampleEncoder
    from vlm.data.sources import Source
    from vlm.evaluation.comparison.checkpoints import ComparisonSettings, compare_checkpoints
    from vlm.evaluation.comparison.records import HELD_OUT, PROBE, read_compared

    cache = resolve_cache_folder(None)
    sets = [(HELD_OUT, config) for config in configs]
    if args.probe:
        sets.append((PROBE, SourceConfig(path=str(write_probe(folder / "probe", args.probe)))))

    def read(model: "VisionLanguageModel") -> "list[ComparedRecord | BadSample]":
        """Read all records as a model reads them."""
        encoder = SampleEncoder(model.processor, model.positions, truncate=False)
        records = []
        for dataset, config in sets:
            source = Source(Path(str(config.path)).name, config, cache, encoder, args.max_frames)
            numbers = draw_records(len(source), args.max_samples if dataset == HELD_OUT else None, seed=0)
            records += read_compared(source, numbers, dataset, args.by)
        return records

    content = [[asdict(config), _stamp(config)] for config in configs]
    settings = ComparisonSettings(
        metrics,
        InferenceConfig(max_new_tokens=args.max_new_tokens),
        args.batch_size,
        json_digest(content, args.probe, args.by, args.max_samples, args.max_frames),
        args.overwrite,
    )
    info = {"data": args.data, "probe": args.probe, "metrics": metrics, "max_new_tokens": args.max_new_tokens}
    print(f"Results go to {folder}")
    comparison = compare_checkpoints(
        _checkpoint(args, args.before), _checkpoint(args, args.after), read, settings, folder, info
    )
    print(printable(f"\n{comparison}\n\n{folder / 'report.md'}"))


def _check(args: argparse.Namespace) -> tuple[list[str], list[SourceConfig]]:
    """Return the names of metrics and the sources of records; refuse what contradicts itself before a model loads."""
    from vlm.evaluation.text_metrics import check_metrics

    metrics = list(dict.fromkeys(name.strip() for name in args.metrics.split(",") if name.strip()))
    if not metrics:
        raise ValueError(f"--metrics {args.metrics!r}: allowed are {', '.join(ANSWER_METRICS)}")
    permit_names(metrics)
    check_metrics(metrics, ANSWER_METRICS, "--metrics ")
    for name, lowest in (("probe", 0), ("max_samples", 1), ("max_new_tokens", 1)):
        if (number := getattr(args, name)) is not None and number < lowest:
            raise ValueError(f"--{name.replace('_', '-')} {number}: at least {lowest} is needed")
    if not args.data and not args.probe:
        raise ValueError("--probe 0 without --data leaves nothing to compare; add --data FILE, or drop --probe 0")
    configs = []
    for path in args.data:
        named = argparse.Namespace(**{**vars(args), "input": path})
        check_reading_options(named, "--data")
        configs.append(config := source_config(named))
        check_references(config, metrics)
    return metrics, configs


def _stamp(config: SourceConfig) -> object:
    """Return what changes with a file of records: its size and the time of its last change; None for other sources."""
    path = Path(str(config.path))
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


def _checkpoint(args: argparse.Namespace, name: str) -> "ComparedCheckpoint":
    """Return a checkpoint that is loaded as the command says; only an adapter gets `--base`."""
    from vlm.assembly.adapter_folder import is_adapter_checkpoint, local_folder
    from vlm.assembly.checkpoint import open_checkpoint
    from vlm.checks.weights import fingerprint
    from vlm.data.cache import json_digest
    from vlm.evaluation.comparison.checkpoints import ComparedCheckpoint

    open_checkpoint(name, trust_remote_code=args.trust_remote_code).check_heads(expected=False)
    base = args.base if is_adapter_checkpoint(name) else []
    own = argparse.Namespace(**{**vars(args), "checkpoint": name, "base": base})
    loaded_as = fingerprint(local_folder(name)), args.dtype, args.quantization, args.max_image_tokens
    return ComparedCheckpoint(name, json_digest(loaded_as), lambda: load_model(own))
