"""The subcommand `vlm runs`: lists the runs below a folder. Imports no torch."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.config.shown import PresentableParser, presentable, printable
from vlm.runs.files import text_at
from vlm.runs.listing import DEFAULT_COLUMNS, Filter, RunTable
from vlm.runs.read import find_runs
from vlm.runs.status_line import REFUSED

EXAMPLES = (
    "vlm runs outputs/sweep --sort eval_loss",
    "vlm runs --filter state=done --filter 'eval_loss<1.2'",
    "vlm runs --columns name,eval_loss,trainer.seed,connector_learning_rate",
)
JSON_COLUMNS = ("path", "recipe", "started", "max_steps", *DEFAULT_COLUMNS, "eval_loss_ci95", "message")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm runs`."""
    parser = PresentableParser(
        "vlm runs",
        "vlm runs [FOLDER] [options]",
        "List runs: their state, losses, speed, and what differs between them.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("outputs"), metavar="FOLDER", help="where to look (outputs)"
    )
    key = (
        "a field (name, state, step, duration, started), a logged metric (eval_loss) or a setting (trainer.seed, seed)"
    )
    parser.add_argument("--sort", metavar="KEY", help=f"sort by {key}; smallest first")
    parser.add_argument("--reverse", action="store_true", help="turn the order around")
    parser.add_argument(
        "--filter",
        metavar="KEY<VALUE",
        action="append",
        default=[],
        help="show runs that meet a condition with <, <=, >, >=, = or !=; may be given several times",
    )
    parser.add_argument("--columns", metavar="KEY,KEY", help="show these columns")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    return parser


def main(argv: Sequence[str]) -> None:
    """List the runs that the command line asks for.

    Raises:
        ValueError: there is no such folder, or no run has a column that is asked for.
    """
    args = make_parser().parse_args(argv)
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder (seen from {Path.cwd()}); name the one that holds the runs")
    table = RunTable(find_runs(args.folder))
    if not table.runs:
        raise ValueError(f"{args.folder}: no runs in it; a run directory has config.yaml and metrics.jsonl")
    asked = None if args.columns is None else [key.strip() for key in args.columns.split(",") if key.strip()]
    runs = table.select([Filter.parse(text) for text in args.filter], args.sort, reverse=args.reverse)
    columns = asked or [*DEFAULT_COLUMNS, *_sorted_by(args.sort)]
    table.check_keys(columns)
    if args.json:
        print(json.dumps(table.rows(runs, asked or JSON_COLUMNS), indent=2, ensure_ascii=False))
        return
    if not runs:
        print(f"None of {len(table.runs):,} runs meets the condition.")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    print(printable(table.format(runs, columns, width)))
    refused = [] if "message" in columns else [run for run in runs if run.state == REFUSED]
    reasons = [f"{run.name} was refused: {text_at(run.status, 'message')}" for run in refused]
    if reasons:
        print("", *map(presentable, reasons), sep="\n")
    damaged = [f"{run.name}/{name}: {why}" for run in runs for name, why in run.files.damaged.items()]
    for line in damaged[:5]:
        print(printable(f"damaged: {line}"), file=sys.stderr)


def _sorted_by(key: str | None) -> list[str]:
    """Return the column that runs are sorted by, if it is not shown anyway."""
    return [] if key is None or key in DEFAULT_COLUMNS else [key]
