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
        args.source, args.out, base_model=args.base_model, vision_tower=args.vision_tower, template=args.template,
        image_mode=args.image_mode, dtype=getattr(torch, args.dtype) if args.dtype else None,
    )  # fmt: skip
    seen = f"{processor.tokens_per_image} tokens an image, image_mode={processor.image_mode}"
    if (tiling := processor.tiling) is not None:
        limit = "" if tiling.max_tiles is None else f", shrunk to about {tiling.max_tiles} tiles"
        seen = f"{processor.tokens_per_image} tokens a tile, images in {len(tiling.grids)} grids of tiles{limit}"
    print(f"{args.out}: {seen}, {config.dtype}")
    first_line = str(processor.chat_template).partition("\n")[0].strip("{#- }")
    print(f"Its chat template: {presentable(first_line)}")
    print(f"Ask it:  vlm generate {args.out} --image FILE --prompt 'What is in this picture?'")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm import`."""
    purpose = (
        "A LLaVA checkpoint (the original code's: whole, projector or LoRA; or transformers'; 1.5, LLaVA-NeXT and "
        "LLaVA-OneVision) as one of this framework, to ask and to train on."
    )
    parser = PresentableParser("vlm import", description=purpose)
    parser.add_argument("source", help="a folder, or a name on the Hub")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--base-model", metavar="MODEL", help="the language model under a projector or a LoRA adapter")
    parser.add_argument("--vision-tower", metavar="MODEL", help="the visual encoder, in place of the named one")
    parser.add_argument("--template", help="plain, v1, chatml … or a .jinja file; default: what the source speaks")
    parser.add_argument("--image-mode", choices=["square", "pad"], help="default: as the source has it")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the language model's")
    return parser
