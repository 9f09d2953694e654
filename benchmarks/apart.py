"""A part of a benchmark in a process of its own, so that its memory is its own: the module is started again for it."""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What tells a benchmark that it is the process that is measured: `--measure`, with `--size` and `--folder`."""
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run_in_subprocess(module: str, what: str, size: Any, folder: Path) -> Any:
    """What `python -m benchmarks.MODULE --measure WHAT` finds: JSON in the last line that it prints."""
    words = [sys.executable, "-m", f"benchmarks.{module}", "--measure", what, "--folder", str(folder)]
    words += ["--size", json.dumps(asdict(size))]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    *told, last = done.stdout.splitlines()
    print(*told, sep="\n", flush=True)
    return json.loads(last)
