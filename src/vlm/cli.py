"""The console script `vlm`: subcommands, the overview, and the training entry for everything else."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from vlm.config.overview import overview


def main(argv: Sequence[str] | None = None) -> None:
    """`vlm generate …` asks a model; any other command line goes to the Hydra entry (`vlm -cn pretrain-smol …`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--help"], ["-h"], ["help"]):
        print(overview())
        return
    if words == ["--version"]:
        print(version("small-vlm"))
        return
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
        return
    from vlm.__main__ import main as train

    train(words)


def generate(words: Sequence[str]) -> None:
    """`vlm generate CHECKPOINT --image F --prompt T`."""
    from vlm.config.schema import InferenceConfig as Defaults

    parser = argparse.ArgumentParser("vlm generate", description="Ask a trained model about pictures.")
    parser.add_argument("checkpoint", help="a run's folder `final`, or a name on the Hub")
    parser.add_argument("--prompt", required=True, help="the question; <image> in it says where a picture stands")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--temperature", type=float, default=Defaults.temperature, help="0 is greedy (%(default)s)")
    top_p, beams, longest = Defaults.top_p, Defaults.num_beams, Defaults.max_new_tokens
    parser.add_argument("--top-p", "--top_p", type=float, default=top_p, help="nucleus sampling (%(default)s)")
    parser.add_argument("--num-beams", "--num_beams", type=int, default=beams, help="beam search where above 1")
    parser.add_argument(
        "--max-new-tokens", "--max_new_tokens", type=int, default=longest, help="longest answer (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=None, help="makes sampling repeatable")
    parser.add_argument("--device", default=None, help="cuda, cpu …; a GPU where there is one")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--trust-remote-code", action="store_true", help="let code out of the checkpoint run")
    args = parser.parse_args(words)
    try:
        _generate(args)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm generate: {error}")


def _generate(args: argparse.Namespace) -> None:
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    from vlm.config.check import check_inference
    from vlm.config.schema import InferenceConfig
    from vlm.inference.generate import VisionLanguageModel, opened, user_turn

    disable_progress_bar()
    settings = InferenceConfig(args.temperature, args.top_p, args.num_beams, args.max_new_tokens)
    check_inference(settings, prefix="")
    images = opened(args.image)
    conversation = [user_turn(args.prompt, len(images))]
    model = VisionLanguageModel.load(
        args.checkpoint, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    if args.seed is not None:
        set_seed(args.seed)
    if args.num_beams > 1:  # beams settle on an answer at the end, so there is nothing to stream
        print(model.answer([conversation], [images], settings)[0])
        return
    for piece in model.stream(conversation, images, settings):
        print(piece, end="", flush=True)
    print()


COMMANDS = {"generate": generate}
