"""`vlm watch FOLDER`: a run in the terminal while it trains, from its files. Imports no torch."""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vlm.config.shown import PresentableParser
from vlm.runs.status_line import FAILED, REFUSED
from vlm.runs.watch import GONE, LiveRun, read_live_run, render, summarize

EXAMPLES = ("vlm watch outputs/smol-finetune", "vlm watch outputs/smol-finetune --once")
HOME, CLEAR_LINE, CLEAR_BELOW, CLEAR_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2J"


def main(argv: Sequence[str]) -> None:
    """Show a run until it ends."""
    args = make_parser().parse_args(list(argv))
    if args.once:
        run = read_live_run(args.run, args.lines)
        print(render(run, shutil.get_terminal_size((100, 24)).columns))
    else:
        run = watch(args.run, args.interval, args.lines)
    sys.exit(1 if run.state in (FAILED, REFUSED, GONE) else 0)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm watch`."""
    parser = PresentableParser(
        "vlm watch",
        "vlm watch FOLDER [options]",
        "Show a run while it trains, from its files: progress, loss, speed, last evaluation, log. The run may be on "
        "another machine whose disk is mounted here. Ctrl-C stops watching, never the run. The exit code is 1 if the "
        "run failed.",
        examples=EXAMPLES,
    )
    parser.add_argument("run", type=Path, metavar="FOLDER", help="the run directory")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="time between two updates (%(default)g)"
    )
    parser.add_argument("--lines", type=int, default=8, metavar="N", help="lines of run.log to show (%(default)d)")
    return parser


def watch(folder: Path, interval: float, num_log_lines: int) -> LiveRun:
    """Show a run until it ends, and return what its files say then; a line for each change if it is no terminal."""
    on_terminal, last = sys.stdout.isatty(), ""
    if on_terminal:
        print(CLEAR_SCREEN, end="")
    while True:
        run = read_live_run(folder, num_log_lines)
        if on_terminal:
            columns, rows = shutil.get_terminal_size((100, 24))
            lines = render(run, columns, None if run.has_ended else rows - 1).splitlines()
            print(HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW, end="", flush=True)
        elif (line := summarize(run)) != last:
            print(line, flush=True)
            last = line
        if run.has_ended:
            return run
        time.sleep(interval)
