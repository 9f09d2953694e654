"""What commands take that let a model answer: how it is loaded, and how answers are drawn.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
import re
from dataclasses import fields
from typing import Any

from vlm.checks.fields import ConfigError, check_fields
from vlm.config.choices import CACHE_IMPLEMENTATIONS
from vlm.config.schema import InferenceConfig


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Let a command say how a model is loaded."""
    parser.add_argument("--device", default=None, help="cuda, cpu …; a GPU where there is one")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    for bits in ("4bit", "8bit"):
        parser.add_argument(
            f"--load-{bits}", f"--load_{bits}", dest="quantization", action="store_const", const=bits,
            help=f"hold the language model in {bits[0]} bits (needs bitsandbytes)",
        )  # fmt: skip
    add_base_option(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="let code out of the checkpoint run")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Let a command say how answers are drawn; the parser is then asked by `parse_intermixed_args`."""
    group = parser.add_argument_group("how answers are drawn", "where nothing is said: as the run of -cn, if any, does")
    for name, kind, purpose in (
        ("temperature", float, "0 is greedy"),
        ("top_p", float, "nucleus sampling"),
        ("num_beams", int, "beam search where above 1"),
        ("max_new_tokens", int, "longest answer"),
    ):
        default = getattr(InferenceConfig, name)
        group.add_argument(*_option_spellings(name), type=kind, metavar="N", help=f"{purpose} ({default})")
    group.add_argument(
        *_option_spellings("cache_implementation"),
        choices=CACHE_IMPLEMENTATIONS,
        help="how keys and values are kept (as the model does)",
    )
    group.add_argument("--seed", type=int, help="makes sampling repeatable")
    group.add_argument("-cn", "--config-name", metavar="RUN", help="a run whose section inference is taken")
    group.add_argument("--config-dir", metavar="FOLDER", help="where a run of your own lies")
    group.add_argument("overrides", nargs="*", metavar="inference.KEY=VALUE", help="changes a key of that run")


def _option_spellings(name: str) -> list[str]:
    """An option with hyphens, and as the key is written."""
    return list(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")))


def read_inference_settings(args: argparse.Namespace) -> InferenceConfig:
    """How answers are drawn: as the command's own options say, else as the run that it names, else by default.

    Raises:
        ConfigError: a value is out of bounds, or a word is no key of a run's section `inference`.
        SystemExit: the run does not compose; as every command that composes one says it.
    """
    from vlm.checks.compose import compose_inference_config

    if unknown := [word for word in args.overrides if not re.match(r"inference\.\w+=", word)]:
        raise ConfigError(f"{unknown[0]}: only inference.KEY=VALUE is taken here, for a run that -cn names")
    if args.config_name is None and (args.overrides or args.config_dir):
        raise ConfigError(f"{args.overrides[0] if args.overrides else '--config-dir'}: name a run with it, -cn RUN")
    settings = InferenceConfig()
    if args.config_name is not None:
        folder = [] if args.config_dir is None else ["--config-dir", args.config_dir]
        settings = compose_inference_config(["-cn", args.config_name, *folder, *args.overrides])
    for name in (field.name for field in fields(InferenceConfig)):
        if (given := getattr(args, name)) is not None:
            setattr(settings, name, given)
    check_fields(settings)
    return settings


def load_model(args: argparse.Namespace) -> Any:
    """The `VisionLanguageModel` of a command's checkpoint.

    Raises:
        ValueError: there is none, or it cannot be loaded so.
    """
    from transformers.utils.logging import disable_progress_bar

    from vlm.inference.generate import VisionLanguageModel

    disable_progress_bar()
    return VisionLanguageModel.load(
        args.checkpoint, device=args.device, dtype=args.dtype, quantization=args.quantization, base=args.base,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip


def add_base_option(parser: argparse.ArgumentParser) -> None:
    """The option that says where an adapter's base lies now."""
    parser.add_argument(
        "--base", "--base-model", "--base_model", "--model-base", action="append", default=[], metavar="PATH",
        help="where an adapter's base lies now, if it was moved; for a base of parts PART=PATH, once for each",
    )  # fmt: skip
