"""The subcommand `vlm merge-lora`: merges an adapter into its base."""

from collections.abc import Sequence
from pathlib import Path

from vlm.assembly.adapter_merge import merge
from vlm.cli.model_options import add_base_options
from vlm.config.shown import PresentableParser


def main(words: Sequence[str]) -> None:
    """`vlm merge-lora CHECKPOINT OUT`, or the same with LLaVA's options."""
    purpose = "Merge a run's adapter into its base: a checkpoint that is complete by itself."
    parser = PresentableParser("vlm merge-lora", description=purpose)
    parser.add_argument("checkpoint", nargs="?", help="a LoRA run's folder `final`, or a name on the Hub")
    parser.add_argument("out", nargs="?", help="a new folder")
    parser.add_argument("--lora-path", "--lora_path", metavar="CHECKPOINT", help="in place of CHECKPOINT")
    parser.add_argument("--output-path", "--output_path", metavar="OUT", help="in place of OUT")
    add_base_options(parser, "let code in the repositories run")
    args = parser.parse_args(words)
    # `--lora-path CHECKPOINT OUT` reads OUT as the first positional word, so the place in this list decides.
    given = [word for word in (args.lora_path, args.checkpoint, args.out, args.output_path) if word]
    if len(given) != 2:
        parser.error("give CHECKPOINT and OUT, each once")
    checkpoint, out = given[0], Path(given[1])
    dtype = merge(checkpoint, out, args.base, trust_remote_code=args.trust_remote_code)
    print(f"{out}: complete, in {dtype}; it needs its base no longer")
    print(f"Ask it:  vlm generate {out} --image FILE --prompt 'What is in this picture?'")
