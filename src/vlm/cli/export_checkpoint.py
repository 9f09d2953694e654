"""`vlm export CHECKPOINT OUT --format NAME`: a checkpoint of this framework in a form that others load.

Modules that import torch are imported when the command has been understood.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm.checks.checkpoint import check_checkpoint
from vlm.config.choices import ADAPTER_FORMAT_DESCRIPTIONS, FORMAT_DESCRIPTIONS
from vlm.config.choices import EXPORT_DTYPES as DTYPES
from vlm.config.shown import PresentableParser


def main(argv: Sequence[str]) -> None:
    """Export a checkpoint, and print how it differs."""
    args = make_parser().parse_args(argv)
    if args.base and args.format not in ADAPTER_FORMAT_DESCRIPTIONS:
        raise ValueError(f"--base {args.base[0]}: --format {args.format} exports complete checkpoints, without a base")
    if args.format in ADAPTER_FORMAT_DESCRIPTIONS:
        if args.vision_tower is not None:
            raise ValueError(f"--vision-tower {args.vision_tower}: it goes with --format llava-original; leave it out")
        if args.dtype is not None:
            raise ValueError(f"--dtype {args.dtype}: an adapter keeps the precision it was trained in; leave it out")
    check_checkpoint(args.checkpoint, adapter=args.format in ADAPTER_FORMAT_DESCRIPTIONS)
    if args.check:
        from vlm.hub.export_check import check_export

        check_export(args.checkpoint, args.format)
        print(f"{args.checkpoint} fits --format {args.format}. Nothing was written.")
        return
    if args.out is None:
        raise ValueError("OUT is missing: the folder to create; only --check needs none")
    if args.format in ADAPTER_FORMAT_DESCRIPTIONS:
        from vlm.hub.vllm_lora import export_vllm_lora

        differences = export_vllm_lora(args.checkpoint, args.out, args.base)
    else:
        from vlm.hub.exporting import export_checkpoint

        differences = export_checkpoint(
            args.checkpoint, args.out, args.format, vision_tower=args.vision_tower, dtype=args.dtype
        )
    print(f"Exported to {args.out} ({args.format}).", *(f"Note: {difference}" for difference in differences), sep="\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm export`."""
    purpose = "Convert a checkpoint to a format that other software loads."
    examples = (
        "vlm export outputs/finetune/final llava-native --format llava",
        "vlm export outputs/finetune/final llava-gguf --format gguf --dtype q8_0",
    )
    parser = PresentableParser(
        "vlm export", "vlm export CHECKPOINT OUT --format NAME [options]", purpose, examples=examples
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder `final`, or a model on the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="the folder to create (--check needs none)")
    described = FORMAT_DESCRIPTIONS | ADAPTER_FORMAT_DESCRIPTIONS
    forms = "; ".join(f"{name}: {reader}" for name, reader in described.items())
    parser.add_argument("--format", required=True, metavar="NAME", choices=described, help=forms)
    base = "vllm-lora: where the adapter's base is now, if it has moved; if the base has parts, PART=PATH for each"
    parser.add_argument("--base", action="append", default=[], metavar="PATH", help=base)
    parser.add_argument(
        "--vision-tower", metavar="NAME", help="llava-original: the name of the visual encoder to record"
    )
    parser.add_argument("--check", action="store_true", help="only say whether the checkpoint fits; write nothing")
    parser.add_argument("--dtype", choices=DTYPES, help="gguf: how matrices are stored (default: unchanged)")
    return parser
