"""The subcommand `vlm serve`. Modules that import torch are imported once the command line has been understood."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vlm.cli.model_options import add_loading_options, load_model

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm serve`."""
    parser = argparse.ArgumentParser(
        "vlm serve", description="Serve a model over HTTP as OpenAI's chat completions, streamed or whole."
    )
    parser.add_argument("checkpoint", help="a run's folder `final`, or a name on the Hub")
    parser.add_argument("--name", help="what requests call the model (default: its folder's or run's name)")
    parser.add_argument("--host", default="127.0.0.1", help="whom it listens to (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    add_loading_options(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm serve CHECKPOINT`."""
    args = make_parser().parse_args(argv)
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]:
        sys.exit(f"vlm serve needs {', '.join(missing)}: pip install 'small-vlm[serve]'")
    try:
        _serve(args)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm serve: {error}")


def _serve(args: argparse.Namespace) -> None:
    import uvicorn

    from vlm.inference.serve import make_app

    model = load_model(args)
    if args.host not in LOOPBACK_HOSTS:
        print(f"Whoever reaches {args.host}:{args.port} can ask the model: there is no password.", file=sys.stderr)
    name = args.name or get_default_name(args.checkpoint)
    print(f"{name}: http://{args.host}:{args.port}/v1")
    hosts = LOOPBACK_HOSTS if args.host in LOOPBACK_HOSTS else ("*",)
    uvicorn.run(make_app(model, name, hosts), host=args.host, port=args.port, log_level="warning")


def get_default_name(checkpoint: str) -> str:
    """Return a checkpoint's name: its name on the Hub, its folder's name, or the run's where the folder is `final`."""
    folder = Path(checkpoint)
    if not folder.exists():
        return checkpoint
    folder = folder.resolve()
    return folder.parent.name if folder.name == "final" else folder.name
