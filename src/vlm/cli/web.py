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


def main(argv: Sequence[str]) -> None:
    """`vlm web [CHECKPOINT …]`."""
    parser = PresentableParser("vlm web", description="A page to chat, predict, train and look through data.")
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="to choose from, besides those of runs")
    parser.add_argument("--host", default="127.0.0.1", help="the address (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="the port (%(default)s)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder of runs (%(default)s)")
    upload = "largest upload (%(default)s)"
    parser.add_argument("--max-upload", "--max_upload", type=str.lower, default="20mb", help=upload)
    password = f"a file whose first line is a password, or - to ask for it (else {PASSWORD_VARIABLE}; default: none)"
    parser.add_argument("--password-file", "--password_file", metavar="FILE", help=password)
    add_base_options(parser, "let code in the checkpoints that are named here run")
    args = parser.parse_args(argv)
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
        raise ValueError(f"--outputs {args.outputs}: it is a file; a folder is needed")
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except OSError as error:
        raise ValueError(f"--host {args.host} --port {args.port}: cannot listen there ({error.strerror})") from error
    for name in args.checkpoints:
        folder = Path(name)
        is_path = name.startswith((".", "/", "~")) or len(folder.parts) != 2 or folder.exists()
        if is_path and not (folder / "config.json").is_file():
            raise ValueError(f"{name}: no checkpoint there (seen from {Path.cwd()}); a run's is its folder `final`")


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
            risk = "may start trainings and read records and images of this machine; nothing is encrypted on the way"
            print(f"WARNING: --host {args.host}: whoever has {secret} {risk}.", flush=True)
        print(f"vlm web: {address}  (Ctrl+C ends it; runs that it started go on)", flush=True)
        page.block_thread()
    finally:
        shutil.rmtree(uploads, ignore_errors=True)
