"""The subcommand `vlm serve`. Modules that import torch are imported once the command line has been understood."""

import argparse
import gc
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlm.checks.checkpoint import check_checkpoint
from vlm.checks.fields import ConfigError, check_fields
from vlm.checks.messages import describe_unknown_key, explain
from vlm.cli.collection import collect_as_usual
from vlm.cli.model_options import add_loading_options, add_thinking_option, load_model
from vlm.config.schema import InferenceConfig
from vlm.config.serving_schema import ServingConfig
from vlm.config.shown import PresentableParser
from vlm.web.guard import RequestGuard, is_loopback

if TYPE_CHECKING:
    from starlette.applications import Starlette

KEY_VARIABLE = "VLM_API_KEY"
"""The environment variable of the API key: on a command line, other users of the machine could read it."""
PREFIX = "serving."
PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")
"""Packages of the extra `serve`."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm serve`."""
    purpose = "Serve a model over HTTP with OpenAI's API: chat completions, embeddings, or predictions of its heads."
    examples = (
        "vlm serve outputs/smol-finetune/final",
        "vlm serve outputs/smol-finetune/final --host 0.0.0.0 --api-key-file key.txt serving.max_batch=32",
    )
    usage = "vlm serve CHECKPOINT [options] [serving.KEY=VALUE …]"
    parser = PresentableParser("vlm serve", usage, purpose, examples=examples)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder `final`, or a model on the Hub")
    limits = "a limit of the server; docs/configuration.md lists them"
    parser.add_argument("overrides", nargs="*", metavar="serving.KEY=VALUE", help=limits)
    parser.add_argument("--name", metavar="NAME", help="the model's name in requests (default: the run's or folder's)")
    address = "the address to listen on (%(default)s: this machine only)"
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help=address)
    parser.add_argument(
        "--port", type=int, default=8000, metavar="PORT", help="the port (%(default)s; 0: any free port)"
    )
    name = "another name by which clients reach this machine, such as a proxy's; may be repeated"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=name)
    key = f"a file that holds the API key (or set {KEY_VARIABLE})"
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=key)
    without = "serve without a key; needed for a --host beyond this machine if there is no key"
    parser.add_argument("--no-api-key", action="store_true", help=without)
    add_thinking_option(parser)
    add_loading_options(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm serve CHECKPOINT [serving.KEY=VALUE …]`."""
    args = make_parser().parse_intermixed_args(argv)
    if missing := [
        name for name in ("starlette", "uvicorn", "pydantic", "prometheus_client") if find_spec(name) is None
    ]:
        sys.exit(f"vlm serve needs {', '.join(missing)}: pip install 'small-vlm[serve]'")
    config = read_serving_config(args.overrides)
    key = read_api_key(args.api_key_file, args.no_api_key, args.host)
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: a number from 0 to 65535 is needed")
    name = args.name or get_default_name(args.checkpoint)
    check_checkpoint(args.checkpoint)
    from vlm.inference.serving.server import bind, make_server

    with bind(args.host, args.port) as bound:  # before the model is loaded, which takes minutes
        app = _make_app(args, name, config, key)
        if key is None and not is_loopback(args.host):
            risk = "anyone who reaches this address can use the model"
            print(f"WARNING: --host {args.host} --no-api-key: {risk}.", file=sys.stderr)
        print(f"{name}: {format_url(args.host, bound.getsockname()[1])}/v1", flush=True)
        gc.collect()
        collect_as_usual()  # without the model's objects, for which each collection would hold up all requests
        make_server(app, config).run(sockets=[bound])


def _make_app(args: argparse.Namespace, name: str, config: ServingConfig, key: str | None) -> "Starlette":
    """Load the model, and return its endpoint."""
    from vlm.assembly.checkpoint import open_checkpoint
    from vlm.inference.embed import Embedder, load_with_heads
    from vlm.inference.engine.engine import Engine
    from vlm.inference.serving.app import make_chat_app, make_classify_app, make_embeddings_app
    from vlm.inference.serving.service import Service

    service = Service(name, config)
    guard = RequestGuard(cast(Any, None), args.host)  # only its decisions are used
    guard.names.update(map(str.lower, args.allow_host))
    if not open_checkpoint(args.checkpoint, trust_remote_code=args.trust_remote_code).has_heads:
        model = load_model(args, InferenceConfig(thinking=args.thinking))
        return make_chat_app(service, Engine(model, config.max_batch), guard.refusal_reason, key)
    if args.thinking is not None:
        raise ValueError(
            f"--{'' if args.thinking else 'no-'}thinking: a model with prediction heads writes no answers; leave it out"
        )
    if args.quantization is not None:
        raise ValueError(f"--load-{args.quantization}: models with prediction heads cannot be quantized; leave it out")
    loaded = load_with_heads(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        base=args.base,
        trust_remote_code=args.trust_remote_code,
        max_image_tokens=args.max_image_tokens,
    )
    if isinstance(loaded, Embedder):
        return make_embeddings_app(service, loaded, guard.refusal_reason, key)
    return make_classify_app(service, loaded, guard.refusal_reason, key)


def read_serving_config(words: Sequence[str]) -> ServingConfig:
    """Return the limits that a command line sets.

    Raises:
        ConfigError: a word is no `serving.KEY=VALUE`, or its value is not allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for word in words:
        match = re.match(r"serving\.(\w+)=", word)
        if match is None:
            raise ConfigError(f"{word[:80]}: one word too many; only serving.KEY=VALUE may follow")
        names = [field.name for field in fields(ServingConfig)]
        if match[1] not in names:
            raise ConfigError(describe_unknown_key(f"{PREFIX}{match[1]}", names))
    schema = OmegaConf.structured(ServingConfig)
    try:
        for word in words:  # one by one, so that a refusal names the key
            schema = OmegaConf.merge(schema, OmegaConf.from_dotlist([word.removeprefix(PREFIX)]))
        config = cast(ServingConfig, OmegaConf.to_object(schema))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{PREFIX}{explain(error)}") from None
    check_fields(config, PREFIX)
    return config


def read_api_key(file: Path | None, is_refused: bool, host: str) -> str | None:
    """Return the API key that requests have to show; None: they need none.

    Args:
        file: a file with the key; None: the environment variable, if it is set.
        is_refused: whether the user wants no key.
        host: the address; beyond this machine a key is needed unless it is refused.

    Raises:
        ValueError: there is none and one is needed, it is blank, or it is given and refused.
    """
    source = KEY_VARIABLE if file is None else f"--api-key-file {file}"
    key = os.environ.get(KEY_VARIABLE) if file is None else file.read_text(encoding="utf-8").strip()
    if is_refused:
        if key is not None:
            raise ValueError(f"--no-api-key and {source} contradict each other; give one of them")
        return None
    if key is not None and (not key.isascii() or not key.isprintable() or not key or " " in key):
        raise ValueError(f"{source}: the key must be one word of printable ASCII characters")
    if key is None and not is_loopback(host):
        hint = f"set {KEY_VARIABLE} or --api-key-file, or allow everyone with --no-api-key"
        raise ValueError(f"--host {host}: other machines can reach it, and there is no API key; {hint}")
    return key


def format_url(host: str, port: int) -> str:
    """Return the address of a server as clients write it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def get_default_name(checkpoint: str) -> str:
    """Return a checkpoint's name: its name on the Hub, its folder's name, or the run's where the folder is `final`."""
    if not Path(checkpoint).exists():
        return checkpoint
    folder = Path(checkpoint).resolve()
    return folder.parent.name if folder.name == "final" else folder.name
