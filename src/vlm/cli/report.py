"""The subcommand `vlm report`: writes `report.html` of runs, also of older ones. Imports no torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm.config.shown import PresentableParser, printable
from vlm.runs.read import read_run
from vlm.runs.report import write_report

EXAMPLES = ("vlm report outputs/smol-finetune", "vlm report outputs/sweep/*/")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm report`."""
    parser = PresentableParser(
        "vlm report",
        "vlm report FOLDER … [options]",
        "Write report.html into a run directory: one file with everything about the run.",
        examples=EXAMPLES,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="a run directory")
    return parser


def main(argv: Sequence[str]) -> None:
    """Write the reports that the command line asks for.

    Raises:
        ValueError: a folder is no run directory.
    """
    args = make_parser().parse_args(argv)
    for run in [read_run(folder) for folder in args.runs]:
        print(printable(str(write_report(run.path))))
