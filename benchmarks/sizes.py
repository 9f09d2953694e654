"""The command line of a benchmark with a size for two cores and one for a large GPU."""

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from benchmarks.shapes import SHAPES

SizeT = TypeVar("SizeT")


def make_parser(description: str | None, numbers: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with `--gpu`, `--shape`, and an option for each of the size's numbers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the size for one large GPU, in bfloat16")
    parser.add_argument("--shape", choices=SHAPES, default=None)
    for name in numbers:
        parser.add_argument(f"--{name}", type=int, default=None)
    return parser


def make_size(args: argparse.Namespace, plain: SizeT, gpu: SizeT) -> SizeT:
    """Return one of two sizes, which are dataclasses, with the values of the command line.

    Raises:
        SystemExit: `--gpu` was given, and there is no GPU.
    """
    require_gpu(args)
    size: Any = gpu if args.gpu else plain
    options = {field.name: getattr(args, field.name, None) for field in fields(size)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return replace(size, **{name: value for name, value in values.items() if value is not None})


def require_gpu(args: argparse.Namespace) -> None:
    """Raise SystemExit where `--gpu` was given and PyTorch sees no GPU."""
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu: PyTorch sees none here; without it, the size for a CPU is measured")
