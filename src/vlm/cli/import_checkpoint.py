"""`vlm import SOURCE OUT`: a LLaVA checkpoint of others as one of this framework.

Modules that import torch are imported when the command has been understood.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm.cli.model_options import DTYPES
from vlm.config.shown import PresentableParser, presentable


def main(argv: Sequence[str]) -> None:
    """Import a checkpoint, and print what it became."""
    args = make_parser().parse_args(argv)
    import torch

    from vlm.hub.importing import import_checkpoint

    config, processor = import_checkpoint(
        args.source,
        args.out,
        base_model=args.base_model,
        vision_tower=args.vision_tower,
        template=args.template,
        image_mode=args.image_mode,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
    )
    seen = f"{processor.tokens_per_image} tokens an image, image_mode={processor.image_mode}"
    if (tiling := processor.tiling) is not None:
        limit = "" if tiling.max_tiles is None else f", shrunk to about {tiling.max_tiles} tiles"
        seen = f"{processor.tokens_per_image} tokens a tile, images in {len(tiling.grids)} grids of tiles{limit}"
    print(f"{args.out}: {seen}, {config.dtype}")
    first_line = str(processor.chat_template).partition("\n")[0].strip("{#- }")
    print(f"Its chat template: {presentable(first_line)}")
    print(f"Try it:  vlm generate {args.out} --image FILE --prompt 'What is in this image?'")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm import`."""
    purpose = (
        "Convert a LLaVA checkpoint (1.5, NeXT or OneVision; from the original code or from transformers; complete, "
        "projector only, or LoRA) to one that vlm can run and train further."
    )
    examples = (
        "vlm import liuhaotian/llava-v1.5-7b llava-1.5-7b",
        "vlm import my-llava-lora llava-lora --base-model lmsys/vicuna-7b-v1.5",
    )
    parser = PresentableParser("vlm import", "vlm import SOURCE OUT [options]", purpose, examples=examples)
    parser.add_argument("source", metavar="SOURCE", help="a folder, or a model on the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to create")
    parser.add_argument(
        "--base-model", metavar="MODEL", help="the language model that a projector or LoRA adapter was trained on"
    )
    parser.add_argument("--vision-tower", metavar="MODEL", help="visual encoder to use instead of the one it names")
    parser.add_argument(
        "--template", metavar="NAME", help="plain, v1, chatml, … or a .jinja file (default: the source's)"
    )
    parser.add_argument(
        "--image-mode", choices=["square", "pad"], help="how images are made square (default: the source's setting)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: the language model's)")
    return parser
