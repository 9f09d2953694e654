"""Options of all commands that generate: how the model is loaded, and its generation settings.

Modules that import torch are imported once the command line has been understood.
"""

import argparse
import re
from typing import TYPE_CHECKING

from vlm.checks.fields import ConfigError, check_fields
from vlm.cli.progress_note import tell
from vlm.config.choices import CACHE_IMPLEMENTATIONS
from vlm.config.schema import InferenceConfig

if TYPE_CHECKING:
    from vlm.inference.conversation import Conversation
    from vlm.inference.generate import VisionLanguageModel

DTYPES = ("float32", "bfloat16", "float16")


def add_loading_options(parser: argparse.ArgumentParser, *, quantized: bool = True, on_base: bool = True) -> None:
    """Add options of how the model is loaded; `quantized`: of quantization; `on_base`: of a base, and of images."""
    parser.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu … (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="precision of the weights (%(default)s: the checkpoint's)",
    )
    for bits in ("4bit", "8bit") if quantized else ():
        purpose = f"load the language model in {bits[0]}-bit precision"
        parser.add_argument(
            f"--load-{bits}",
            dest="quantization",
            action="store_const",
            const=bits,
            help=f"{purpose} (needs small-vlm[quant])",
        )
    trust = "allow code that comes with the checkpoint to run"
    if on_base:
        purpose = "most tokens per image; larger images are shrunk"
        parser.add_argument(
            "--max-image-tokens", type=_positive, metavar="N", help=f"{purpose} (default: the checkpoint's setting)"
        )
        add_base_options(parser, trust)
    else:
        parser.add_argument("--trust-remote-code", action="store_true", help=trust)


def add_base_options(parser: argparse.ArgumentParser, trust: str) -> None:
    """Add `--base` and `--trust-remote-code`; `trust` is the help of the latter."""
    spellings = ("--base", "--base-model", "--model-base")
    purpose = "where an adapter's base model is now, if it has moved; if the base has parts, PART=PATH for each"
    parser.add_argument(*spellings, action="append", default=[], metavar="PATH", help=purpose)
    parser.add_argument("--trust-remote-code", action="store_true", help=trust)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add generation settings and loading options; words have to be parsed by `parse_intermixed_args`."""
    group = parser.add_argument_group("generation", "defaults come from the run that -cn names, if any")
    for name, kind, purpose in (
        ("temperature", float, "sampling temperature; 0 decodes greedily"),
        ("top_p", float, "nucleus sampling threshold"),
        ("num_beams", int, "number of beams; 1 is no beam search"),
        ("max_new_tokens", int, "most tokens in an answer"),
    ):
        default = getattr(InferenceConfig, name)
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{purpose} ({default})")
    group.add_argument(
        "--cache-implementation", choices=CACHE_IMPLEMENTATIONS, help="type of KV cache (default: the model's)"
    )
    add_thinking_option(group)
    group.add_argument("--seed", type=int, metavar="N", help="seed for sampling")
    group.add_argument("-cn", "--config-name", metavar="RUN", help="use the inference section of this run")
    group.add_argument("--config-dir", metavar="FOLDER", help="folder with your own runs")
    group.add_argument("overrides", nargs="*", metavar="inference.KEY=VALUE", help="override a key of that run")
    add_loading_options(parser)


def add_thinking_option(parser: "argparse._ActionsContainer") -> None:
    """Add `--thinking` and `--no-thinking`."""
    purpose = "turn thinking before the answer on or off, if the chat template supports it (default: as trained)"
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, default=None, help=purpose)


def _positive(text: str) -> int:
    """Return a whole number above 0; ValueError, which argparse reports, for any other text."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def read_inference_settings(args: argparse.Namespace) -> InferenceConfig:
    """Return the generation settings: the command's own options, else those of the run that it names, else defaults.

    Raises:
        ConfigError: a value is out of bounds, or an override is no key of a run's section `inference`.
        SystemExit: the run does not compose.
    """
    from vlm.checks.compose import compose_inference_config

    if unknown := [word for word in args.overrides if not re.match(r"inference\.\w+=", word)]:
        raise ConfigError(f"{unknown[0]}: one word too many; only inference.KEY=VALUE may follow, with -cn RUN")
    if args.config_name is None and (args.overrides or args.config_dir):
        raise ConfigError(
            f"{args.overrides[0] if args.overrides else '--config-dir'}: add -cn RUN, the run that it changes"
        )
    settings = InferenceConfig()
    if args.config_name is not None:
        folder_words = [] if args.config_dir is None else ["--config-dir", args.config_dir]
        settings = compose_inference_config(["-cn", args.config_name, *folder_words, *args.overrides])
    for name in list(vars(settings)):
        if (value := getattr(args, name)) is not None:
            setattr(settings, name, value)
    check_fields(settings)
    return settings


def load_model(args: argparse.Namespace, settings: InferenceConfig | None = None) -> "VisionLanguageModel":
    """Load a command's checkpoint; ValueError if there is none, or it does not load with these options.

    `settings` say whether it thinks; None: as it was trained.
    """
    tell(f"Loading {args.checkpoint}")
    from transformers.utils.logging import disable_progress_bar

    from vlm.inference.generate import VisionLanguageModel

    disable_progress_bar()
    model = VisionLanguageModel.load(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        base=args.base,
        trust_remote_code=args.trust_remote_code,
        max_image_tokens=args.max_image_tokens,
    )
    if settings is not None and settings.thinking is not None:
        from vlm.models.processing_messages import set_thinks

        set_thinks(model.processor.tokenizer, settings.thinking)
    return model


def open_conversation(args: argparse.Namespace, settings: InferenceConfig) -> "Conversation":
    """Load a command's checkpoint, and begin a conversation with it."""
    model = load_model(args, settings)
    from vlm.inference.conversation import Conversation

    if args.seed is not None:
        from transformers import set_seed  # imports peft, which is slow

        set_seed(args.seed)
    return Conversation(model, settings, system_prompt=args.system_prompt, max_frames=args.max_frames)
