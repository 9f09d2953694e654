"""The subcommand `vlm serve`. Modules that import torch are imported once the command line has been understood."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vlm.cli.model_options import add_loading_options, load_model

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


def main(argv: Sequence[str]) -> None:
    """`vlm serve CHECKPOINT`."""
    purpose = "Serve a model over HTTP as OpenAI's chat completions, streamed or whole."
    parser = argparse.ArgumentParser("vlm serve", description=purpose)
    parser.add_argument("checkpoint", help="a run's folder `final`, or a name on the Hub")
    parser.add_argument("--name", help="what requests call the model (default: its folder's or run's name)")
    parser.add_argument("--host", default="127.0.0.1", help="whom it listens to (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    add_loading_options(parser)
    args = parser.parse_args(argv)
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]:
        sys.exit(f"vlm serve needs {', '.join(missing)}: pip install 'small-vlm[serve]'")
    import uvicorn

    from vlm.inference.serve import make_app

    model = load_model(args)
    hosts = LOOPBACK_HOSTS
    if args.host not in LOOPBACK_HOSTS:
        print(f"Whoever reaches {args.host}:{args.port} can ask the model: there is no password.", file=sys.stderr)
        hosts = ("*",)
    name = args.name or get_default_name(args.checkpoint)
    print(f"{name}: http://{args.host}:{args.port}/v1")
    uvicorn.run(make_app(model, name, hosts), host=args.host, port=args.port, log_level="warning")


def get_default_name(checkpoint: str) -> str:
    """Return a checkpoint's name: its name on the Hub, its folder's name, or the run's where the folder is `final`."""
    if not Path(checkpoint).exists():
        return checkpoint
    folder = Path(checkpoint).resolve()
    return folder.parent.name if folder.name == "final" else folder.name
