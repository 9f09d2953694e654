"""The subcommands `vlm import` and `vlm export`.

Imports `vlm.hub`; the modules that import torch are imported when a command has been understood.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
FORMS = {
    "llava": "transformers and vLLM, without remote code",
    "llava-original": "the original LLaVA's code, and SGLang",
}
"""The forms of `vlm.hub.targets.TARGETS`, named here too so that `--help` does not import torch, and who reads them."""


def import_parser() -> argparse.ArgumentParser:
    """What `vlm import` takes."""
    purpose = (
        "A LLaVA checkpoint (the original code's: whole, projector or LoRA; or transformers'; 1.5, LLaVA-NeXT and "
        "LLaVA-OneVision) as one of this framework, to ask and to train on."
    )
    parser = argparse.ArgumentParser("vlm import", description=purpose)
    parser.add_argument("source", help="a folder, or a name on the Hub")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--base-model", metavar="MODEL", help="the language model under a projector or a LoRA adapter")
    parser.add_argument("--vision-tower", metavar="MODEL", help="the visual encoder, in place of the named one")
    parser.add_argument("--template", help="plain, v1, chatml … or a .jinja file; default: what the source speaks")
    parser.add_argument("--image-mode", choices=["square", "pad"], help="default: as the source has it")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the language model's")
    return parser


def import_(words: Sequence[str]) -> None:
    """`vlm import SOURCE OUT`."""
    _carry_out("import", _import, import_parser().parse_args(words))


def _import(args: argparse.Namespace) -> None:
    import torch

    from vlm.hub.importing import import_checkpoint

    config, processor = import_checkpoint(
        args.source, args.out, base_model=args.base_model, vision_tower=args.vision_tower, template=args.template,
        image_mode=args.image_mode, dtype=getattr(torch, args.dtype) if args.dtype else None,
    )  # fmt: skip
    begins = str(processor.chat_template).splitlines()[0].strip("{#- }")
    seen = f"{processor.tokens_per_image} tokens a picture, image_mode={processor.image_mode}"
    if (tiling := processor.tiling) is not None:
        limit = "" if tiling.max_tiles is None else f", shrunk to about {tiling.max_tiles} tiles"
        seen = f"{processor.tokens_per_image} tokens a tile, pictures in {len(tiling.grids)} grids of tiles{limit}"
    print(f"{args.out}: {seen}, {config.dtype}")
    print(f"Its chat template: {begins}")
    print(f"Ask it:  vlm generate {args.out} --image FILE --prompt 'What is in this picture?'")


def export_parser() -> argparse.ArgumentParser:
    """What `vlm export` takes."""
    purpose = "A checkpoint of this framework in a form that others load."
    parser = argparse.ArgumentParser("vlm export", description=purpose)
    parser.add_argument("checkpoint", help="a run's folder `final`, or a name on the Hub")
    parser.add_argument("out", type=Path, help="a new folder")
    forms = "; ".join(f"{name}: {reader}" for name, reader in FORMS.items())
    parser.add_argument("--format", required=True, choices=FORMS, help=forms)
    parser.add_argument("--vision-tower", metavar="NAME", help="with llava-original: the encoder's name to write down")
    return parser


def export(words: Sequence[str]) -> None:
    """`vlm export CHECKPOINT OUT --format …`."""
    _carry_out("export", _export, export_parser().parse_args(words))


def _export(args: argparse.Namespace) -> None:
    from vlm.hub.exporting import export_checkpoint

    differences = export_checkpoint(args.checkpoint, args.out, args.format, vision_tower=args.vision_tower)
    print(f"{args.out}: as {args.format}")
    for one in differences:
        print(f"Note: {one}")


def _carry_out(name: str, act: Callable[[Any], None], args: argparse.Namespace) -> None:
    try:
        act(args)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm {name}: {error}")
