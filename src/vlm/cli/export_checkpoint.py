"""`vlm export CHECKPOINT OUT --format NAME`: a checkpoint of this framework in a form that others load.

Modules that import torch are imported when the command has been understood.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm.config.choices import ADAPTER_FORMAT_DESCRIPTIONS, FORMAT_DESCRIPTIONS
from vlm.config.choices import EXPORT_DTYPES as DTYPES
from vlm.config.shown import PresentableParser


def main(argv: Sequence[str]) -> None:
    """Export a checkpoint, and print how it differs."""
    args = make_parser().parse_args(argv)
    if args.base and args.format not in ADAPTER_FORMAT_DESCRIPTIONS:
        raise ValueError(f"--base {args.base[0]}: --format {args.format} exports complete checkpoints, which have none")
    if args.format in ADAPTER_FORMAT_DESCRIPTIONS:
        if args.vision_tower is not None:
            raise ValueError(f"--vision-tower {args.vision_tower} is a name that --format llava-original writes down")
        if args.dtype is not None:
            raise ValueError(f"--dtype {args.dtype}: an adapter keeps the precision in which it was trained")
        from vlm.hub.vllm_lora import export_vllm_lora

        differences = export_vllm_lora(args.checkpoint, args.out, args.base)
    else:
        from vlm.hub.exporting import export_checkpoint

        options = {"vision_tower": args.vision_tower, "dtype": args.dtype}
        differences = export_checkpoint(args.checkpoint, args.out, args.format, **options)
    print(f"{args.out}: as {args.format}", *(f"Note: {difference}" for difference in differences), sep="\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm export`."""
    purpose = "A checkpoint of this framework in a form that others load."
    parser = PresentableParser("vlm export", description=purpose)
    parser.add_argument("checkpoint", help="a run's folder `final`, or a name on the Hub")
    parser.add_argument("out", type=Path, help="a new folder")
    described = FORMAT_DESCRIPTIONS | ADAPTER_FORMAT_DESCRIPTIONS
    forms = "; ".join(f"{name}: {reader}" for name, reader in described.items())
    parser.add_argument("--format", required=True, choices=described, help=forms)
    base = "with vllm-lora: the new place of the adapter's base, if it was moved; of parts PART=PATH, once for each"
    parser.add_argument("--base", action="append", default=[], metavar="PATH", help=base)
    parser.add_argument("--vision-tower", metavar="NAME", help="with llava-original: the encoder's name to write down")
    parser.add_argument("--dtype", choices=DTYPES, help="with gguf: how matrices are stored; as they are by default")
    return parser
