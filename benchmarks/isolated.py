"""Runs a part of a benchmark in a separate process, so that its memory can be measured."""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measured process: `--measure`, with `--size` and `--folder`."""
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run_in_subprocess(module: str, part: str, size: Any, folder: Path) -> Any:
    """Return the result of `python -m benchmarks.MODULE --measure PART`: JSON in the last line that it prints."""
    words = [sys.executable, "-m", f"benchmarks.{module}", "--measure", part, "--folder", str(folder)]
    words += ["--size", json.dumps(asdict(size))]
    process = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    *lines, result = process.stdout.splitlines()
    print(*lines, sep="\n", flush=True)
    return json.loads(result)
