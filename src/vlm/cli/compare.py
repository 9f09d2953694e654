"""The subcommand `vlm compare`: two runs or more next to each other. Imports no torch.

`vlm compare-models` asks two models; this reads what runs have left behind.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm.config.shown import PresentableParser, printable
from vlm.runs.comparison import RunComparison
from vlm.runs.comparison_views import describe_comparison, make_comparison_page
from vlm.runs.read import read_run

EXAMPLES = ("vlm compare outputs/first outputs/second", "vlm compare outputs/sweep/*/ --html comparison.html")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm compare`."""
    parser = PresentableParser(
        "vlm compare",
        "vlm compare FOLDER FOLDER … [options]",
        "Compare runs: settings that differ, metrics with intervals, curves, sample answers. The others are compared "
        "with the first run.",
        examples=EXAMPLES,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="a run directory; two at least")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with all curves and images too")
    return parser


def main(argv: Sequence[str]) -> None:
    """Compare the runs that the command line names.

    Raises:
        ValueError: a folder is no run directory, there is one run alone, or the page cannot be written there.
    """
    args = make_parser().parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    if len({run.path.resolve() for run in runs}) < 2:
        raise ValueError(f"{args.runs[0]}: a comparison needs two runs or more; vlm report {args.runs[0]} shows one")
    if args.html is not None and not args.html.parent.is_dir():
        raise ValueError(f"--html {args.html}: there is no folder {args.html.parent}")
    comparison = RunComparison(runs)
    print(printable(describe_comparison(comparison)))
    if args.html is not None:
        args.html.write_text(make_comparison_page(comparison), encoding="utf-8")
        print(printable(f"\nPage: {args.html}"))
