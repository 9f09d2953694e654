"""The subcommand `vlm eval`: a model's answers to a file of records, or lmms-eval's tasks.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from vlm.checks.checkpoint import check_checkpoint
from vlm.checks.weights import identify_weights
from vlm.cli.model_options import add_generation_options, load_model, read_inference_settings
from vlm.cli.record_options import add_max_frames_option, add_reading_options, check_reading_options, source_config
from vlm.config.choices import ANSWER_METRICS, HALLUCINATION_METRICS, LOSS_METRICS, OBJECT_METRICS
from vlm.config.named import permit_names
from vlm.config.schema import TrainerOptions
from vlm.config.shown import PresentableParser, printable
from vlm.evaluation.output import check_no_results, check_references, resolve_output_folder, write_json

if TYPE_CHECKING:
    from vlm.evaluation.records import EvaluationResult

RECORD_OPTIONS = (
    "format", "option", "image_folder", "temperature", "top_p", "num_beams", "max_new_tokens", "cache_implementation",
    "seed", "config_name", "config_dir", "overrides", "retrieval_candidates",
)  # fmt: skip
"""Options that lmms-eval's tasks do not take: a task defines its questions and its generation settings."""
TASK_OPTIONS = ("limit", "include_path", "lmms_eval_python")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm eval`."""
    purpose = "Evaluate a model on a file of records or on lmms-eval tasks."
    examples = (
        "vlm eval outputs/smol-finetune/final --data val.json --image-folder images --metrics exact_match,cider,loss",
        "vlm eval outputs/smol-finetune/final --tasks mme,gqa,textvqa_val",
    )
    usage = "vlm eval CHECKPOINT (--data FILE | --tasks NAME,NAME) [options]"
    parser = PresentableParser("vlm eval", usage, purpose, examples=examples)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder `final`, or a model on the Hub")
    output = "folder for the results (default: eval/ in the checkpoint's run)"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=output)
    records = parser.add_argument_group("a file of records")
    records.add_argument(
        "--data", dest="input", metavar="FILE", help="records with reference replies, in any training format"
    )
    known = (*ANSWER_METRICS, *OBJECT_METRICS, *HALLUCINATION_METRICS, *LOSS_METRICS)
    metrics = f"{', '.join(known)}, or module:function (%(default)s)"
    records.add_argument("--metrics", default="exact_match,loss", metavar="NAME,NAME", help=metrics)
    candidates = f"for retrieval: texts per image, including its own ({TrainerOptions.eval_retrieval_candidates})"
    records.add_argument("--retrieval-candidates", type=int, metavar="N", help=candidates)
    add_reading_options(records)
    add_max_frames_option(parser)
    tasks = parser.add_argument_group("lmms-eval tasks", "these run in an environment of their own: make install-eval")
    tasks.add_argument("--tasks", metavar="NAME,NAME", help="mme, gqa, textvqa_val, …")
    limit = "only the first N documents of each task, or a share below 1"
    tasks.add_argument("--limit", type=float, metavar="N", help=limit)
    tasks.add_argument("--include-path", type=Path, metavar="FOLDER", help="folder with your own tasks")
    tasks.add_argument("--lmms-eval-python", type=Path, metavar="FILE", help="Python interpreter that has lmms-eval")
    add_generation_options(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm eval CHECKPOINT --data RECORDS --metrics …`, or `--tasks …`."""
    args = make_parser().parse_intermixed_args(argv)
    try:
        if (args.input is None) == (args.tasks is None):
            raise ValueError("give --data for a file of records, or --tasks for tasks of lmms-eval")
        mode, disallowed = ("--data", TASK_OPTIONS) if args.input else ("--tasks", RECORD_OPTIONS)
        for name in disallowed:
            if getattr(args, name) not in (None, []):
                raise ValueError(f"--{name.replace('_', '-')} cannot be used with {mode}")
        check_reading_options(args, "--data")
        _run_tasks(args) if args.tasks else _evaluate_records(args)
    except KeyboardInterrupt:
        sys.exit("\nvlm eval: stopped" + ("; the same command resumes it" if args.input else ""))


def _evaluate_records(args: argparse.Namespace) -> None:
    """Evaluate the model on a file of records."""
    from vlm.evaluation.text_metrics import ALL_METRICS, check_metrics

    names = list(dict.fromkeys(name.strip() for name in args.metrics.split(",") if name.strip()))
    if not names:
        raise ValueError(f"--metrics {args.metrics!r}: allowed are {', '.join(ALL_METRICS)}")
    permit_names(names)
    check_metrics(names, ALL_METRICS, "--metrics ")
    candidates = args.retrieval_candidates
    if candidates is None:
        candidates = TrainerOptions.eval_retrieval_candidates
    elif candidates < 2:
        raise ValueError(f"--retrieval-candidates {candidates}: at least 2 are needed, an image's own text and another")
    elif "retrieval" not in names:
        raise ValueError(
            f"--retrieval-candidates {candidates}: it needs --metrics retrieval; add that, or leave it out"
        )
    folder = resolve_output_folder(args.checkpoint, Path(args.input).stem, args.output)
    check_no_results(folder, args.checkpoint, overwrite=args.overwrite)
    config, settings = source_config(args), read_inference_settings(args)
    check_references(config, names)
    check_checkpoint(args.checkpoint, heads=False)

    from vlm.assembly.adapter_folder import local_folder
    from vlm.data.cache import json_digest, resolve_cache_folder
    from vlm.evaluation.records import evaluate, write_results

    model = load_model(args, settings)
    print(f"Results go to {folder}")
    weights = identify_weights(args.checkpoint, local_folder(args.checkpoint))
    loaded_as = weights["fingerprint"], args.dtype, args.quantization
    evaluation = evaluate(
        model, config, names, folder, settings, cache=resolve_cache_folder(None), fingerprint=json_digest(loaded_as),
        batch_size=args.batch_size, num_workers=args.num_workers, max_frames=args.max_frames, seed=args.seed,
        overwrite=args.overwrite, retrieval_candidates=candidates,
    )  # fmt: skip
    generation = {} if set(names) <= set(LOSS_METRICS) else {"inference": vars(settings), "seed": args.seed}
    _write_record_sums(folder, evaluation)
    write_results(folder, evaluation, {**_describe_run(args), "weights": weights, "data": args.input, **generation})
    print(printable(f"\n{evaluation.records:,} records\n\n{evaluation}\n\nResults: {folder / 'results.json'}"))


def _write_record_sums(folder: Path, evaluation: "EvaluationResult") -> None:
    """Write what the losses are of each record, for `vlm compare`; remove what an earlier evaluation wrote."""
    from vlm.runs.evaluated_records import RECORD_SUMS_FILE, EvaluatedRecords

    kept, file = EvaluatedRecords.to_keep(evaluation.identity, evaluation.sums), folder / RECORD_SUMS_FILE
    if kept is None:
        file.unlink(missing_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(kept.to_json(), encoding="utf-8")


def _run_tasks(args: argparse.Namespace) -> None:
    """Run lmms-eval's tasks, and write their scores."""
    from vlm.evaluation import lmms_run

    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.limit is not None and args.limit <= 0:
        raise ValueError(f"--limit {args.limit:g}: a number above 0 is needed")
    if args.include_path is not None and not args.include_path.is_dir():
        raise ValueError(f"--include-path {args.include_path}: no such folder (seen from {Path.cwd()})")
    folder = resolve_output_folder(args.checkpoint, "+".join(tasks)[:80], args.output)
    check_no_results(folder, args.checkpoint, overwrite=args.overwrite)
    python = lmms_run.find_interpreter(args.lmms_eval_python)
    check_checkpoint(args.checkpoint, heads=False)

    from vlm.assembly.adapter_folder import local_folder
    from vlm.assembly.checkpoint import open_checkpoint

    open_checkpoint(args.checkpoint).check_heads(expected=False)
    options = {
        "pretrained": args.checkpoint,
        "base": ";".join(args.base) or None,
        "device": args.device,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "max_frames": args.max_frames,
        "system_prompt": args.system_prompt,
        "trust_remote_code": args.trust_remote_code or None,
        "max_image_tokens": args.max_image_tokens,
    }
    arguments = lmms_run.format_model_args({name: value for name, value in options.items() if value is not None})
    results = lmms_run.run_tasks(
        python, arguments, tasks, batch_size=args.batch_size, limit=args.limit, include=args.include_path
    )
    scores = lmms_run.parse_scores(results)
    rows = lmms_run.make_rows(scores)
    weights = identify_weights(args.checkpoint, local_folder(args.checkpoint))
    content = {"weights": weights, "limit": args.limit, "results": lmms_run.scores_to_json(scores)}
    write_json(folder, {**_describe_run(args), **content})
    limited = [] if args.limit is None else [f"Only part of each task was evaluated (--limit {args.limit:g})."]
    parts = [f"`{args.checkpoint}`", tabulate(rows, "firstrow", tablefmt="github", disable_numparse=True), *limited]
    (folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plain = tabulate(rows, tablefmt="plain", disable_numparse=True)
    print(printable(f"\n{plain}\n\nResults: {folder / 'results.json'}"))


def _describe_run(args: argparse.Namespace) -> dict[str, object]:
    """Return which checkpoint was evaluated, and how it was loaded."""
    names = ("checkpoint", "base", "dtype", "quantization", "max_image_tokens", "system_prompt", "batch_size")
    return {name: getattr(args, name) for name in names}
