"""The subcommand `vlm merge-lora`: merges an adapter into its base."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm.checks.checkpoint import check_checkpoint
from vlm.cli.model_options import add_base_options
from vlm.config.shown import PresentableParser


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm merge-lora`."""
    purpose = "Merge a LoRA adapter into its base model, which gives a complete checkpoint."
    examples = ("vlm merge-lora outputs/lora/final outputs/lora-merged",)
    parser = PresentableParser("vlm merge-lora", "vlm merge-lora CHECKPOINT OUT [options]", purpose, examples=examples)
    checkpoint = "a LoRA run's folder `final`, or an adapter on the Hub"
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=checkpoint)
    parser.add_argument("out", nargs="?", metavar="OUT", help="the folder to create")
    parser.add_argument("--lora-path", metavar="CHECKPOINT", help="same as CHECKPOINT")
    parser.add_argument("--output-path", metavar="OUT", help="same as OUT")
    add_base_options(parser, "allow code that comes with the checkpoints to run")
    return parser


def main(words: Sequence[str]) -> None:
    """`vlm merge-lora CHECKPOINT OUT`, or the same with LLaVA's options."""
    parser = make_parser()
    args = parser.parse_args(words)
    # `--lora-path CHECKPOINT OUT` reads OUT as the first positional word, so the place in this list decides.
    given = [word for word in (args.lora_path, args.checkpoint, args.out, args.output_path) if word]
    if len(given) != 2:
        parser.error("give CHECKPOINT and OUT once each")
    checkpoint, out = given[0], Path(given[1])
    check_checkpoint(checkpoint)
    from vlm.assembly.adapter_merge import merge  # imports torch

    dtype = merge(checkpoint, out, args.base, trust_remote_code=args.trust_remote_code)
    print(f"Merged into {out} ({dtype}), which no longer needs its base.")
    print(f"Try it:  vlm generate {out} --image FILE --prompt 'What is in this image?'")
