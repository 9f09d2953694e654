"""The subcommand `vlm merge-lora`: merges an adapter into its base."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.assembly.adapter_merge import merge
from vlm.cli.model_options import add_base_option


def main(words: Sequence[str]) -> None:
    """`vlm merge-lora CHECKPOINT OUT`, or the same with LLaVA's options."""
    parser = argparse.ArgumentParser(
        "vlm merge-lora", description="Merge a run's adapter into its base: a checkpoint that is complete by itself."
    )
    parser.add_argument("checkpoint", nargs="?", help="a LoRA run's folder `final`, or a name on the Hub")
    parser.add_argument("out", nargs="?", type=Path, help="a new folder")
    add_base_option(parser)
    parser.add_argument("--lora-path", "--lora_path", metavar="CHECKPOINT", help="in place of CHECKPOINT")
    parser.add_argument("--output-path", "--output_path", metavar="OUT", type=Path, help="in place of OUT")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code in the repositories run")
    args = parser.parse_args(words)
    if args.lora_path and args.checkpoint and args.output_path is None and args.out is None:
        args.out, args.checkpoint = Path(args.checkpoint), None  # `--lora-path CHECKPOINT OUT`
    checkpoints = [name for name in (args.checkpoint, args.lora_path) if name]
    outputs: list[Path] = [folder for folder in (args.out, args.output_path) if folder]
    if len(checkpoints) != 1 or len(outputs) != 1:
        parser.error("give CHECKPOINT and OUT, each once")
    out = outputs[0]
    try:
        dtype = merge(checkpoints[0], out, args.base, trust_remote_code=args.trust_remote_code)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm merge-lora: {error}")
    print(f"{out}: complete, in {dtype}; it needs its base no longer")
    print(f"Ask it:  vlm generate {out} --image FILE --prompt 'What is in this picture?'")
