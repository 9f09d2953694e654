"""`vlm export CHECKPOINT OUT --format NAME`: a checkpoint of this framework in a form that others load.

Modules that import torch are imported when the command has been understood.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

FORMAT_DESCRIPTIONS = {
    "llava": "transformers and vLLM, without remote code",
    "llava-original": "the original LLaVA's code, and SGLang",
}
"""The forms of `vlm.hub.targets.TARGETS`, named here too so that `--help` does not import torch, and who reads them."""


def main(argv: Sequence[str]) -> None:
    """`vlm export CHECKPOINT OUT --format NAME`."""
    args = make_parser().parse_args(argv)
    try:
        export_checkpoint(args)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm export: {error}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm export`."""
    purpose = "A checkpoint of this framework in a form that others load."
    parser = argparse.ArgumentParser("vlm export", description=purpose)
    parser.add_argument("checkpoint", help="a run's folder `final`, or a name on the Hub")
    parser.add_argument("out", type=Path, help="a new folder")
    forms = "; ".join(f"{name}: {reader}" for name, reader in FORMAT_DESCRIPTIONS.items())
    parser.add_argument("--format", required=True, choices=FORMAT_DESCRIPTIONS, help=forms)
    parser.add_argument("--vision-tower", metavar="NAME", help="with llava-original: the encoder's name to write down")
    return parser


def export_checkpoint(args: argparse.Namespace) -> None:
    """Export the checkpoint and print how it differs."""
    from vlm.hub import exporting

    differences = exporting.export_checkpoint(args.checkpoint, args.out, args.format, vision_tower=args.vision_tower)
    print(f"{args.out}: as {args.format}")
    for one in differences:
        print(f"Note: {one}")
