"""The subcommand `vlm web`: its options, and checks before the page is built."""

import argparse
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vlm.cli.model_options import add_base_options
from vlm.config.shown import PresentableParser
from vlm.web.access import PASSWORD_VARIABLE, Access, read_password
from vlm.web.guard import is_loopback


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm web`."""
    purpose = "Open a local web page to chat, predict, train, watch runs and browse data."
    examples = ("vlm web", "vlm web outputs/smol-finetune/final --port 8080")
    parser = PresentableParser("vlm web", "vlm web [CHECKPOINT …] [options]", purpose, examples=examples)
    checkpoints = "models to offer in addition to those of your runs"
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help=checkpoints)
    address = "the address to listen on (%(default)s: this machine only)"
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help=address)
    parser.add_argument("--port", type=int, default=7860, metavar="PORT", help="the port (%(default)s)")
    outputs = "the folder that holds your runs (%(default)s)"
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="FOLDER", help=outputs)
    upload = "largest file that may be uploaded (%(default)s)"
    parser.add_argument("--max-upload", type=str.lower, default="20mb", metavar="SIZE", help=upload)
    password = f"a file whose first line is the password, or - to be asked (or set {PASSWORD_VARIABLE}; default: none)"
    parser.add_argument("--password-file", metavar="FILE", help=password)
    add_base_options(parser, "allow code that comes with the named checkpoints to run")
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm web [CHECKPOINT …]`."""
    args = make_parser().parse_args(argv)
    if find_spec("gradio") is None:
        sys.exit("vlm web: Gradio is not installed: pip install 'small-vlm[web]'")
    _check_arguments(args)
    _serve(args, Access(password=read_password(args.password_file)))


def _check_arguments(args: argparse.Namespace) -> None:
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: a number from 1 to 65535 is needed")
    if not re.fullmatch(r"[1-9]\d*(kb|mb|gb)", args.max_upload):
        raise ValueError(f"--max-upload {args.max_upload}: a size such as 20mb is needed (kb, mb or gb)")
    if args.outputs.exists() and not args.outputs.is_dir():
        raise ValueError(f"--outputs {args.outputs}: this is a file; a folder is needed")
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except OSError as error:
        raise ValueError(f"--host {args.host} --port {args.port}: cannot listen there ({error.strerror})") from error
    for name in args.checkpoints:
        folder = Path(name)
        is_path = name.startswith((".", "/", "~")) or len(folder.parts) != 2 or folder.exists()
        if is_path and not (folder / "config.json").is_file():
            raise ValueError(f"{name}: no checkpoint there (seen from {Path.cwd()}); a run keeps it in `final`")


def _serve(args: argparse.Namespace, access: Access) -> None:
    uploads = tempfile.mkdtemp(prefix="small-vlm-web-")
    os.environ["GRADIO_TEMP_DIR"] = uploads  # the default is shared by all users of the machine
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    for name in ("NO_PROXY", "no_proxy"):  # Gradio checks that the page is up: not through a proxy
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # so that uploads are removed
    try:
        from vlm.web.page import PageSettings, build, serve

        options = {name: value for name, value in vars(args).items() if name != "password_file"}
        settings = PageSettings(**options, access=access)
        page = build(settings)
        address = serve(page, settings)
        if not is_loopback(args.host):
            secret = "this address" if access.password is None else "this address or the password"
            risk = "can start training and read records and images on this machine; the connection is not encrypted"
            print(f"WARNING: --host {args.host}: anyone with {secret} {risk}.", flush=True)
        print(f"vlm web: {address}  (Ctrl+C stops the page; runs that it started keep going)", flush=True)
        page.block_thread()
    finally:
        shutil.rmtree(uploads, ignore_errors=True)
