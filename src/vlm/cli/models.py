"""The subcommand `vlm models`: lists parts and types of models, with what was proved of each."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from vlm.cli.model_listing import list_models
from vlm.config.shown import PresentableParser, presentable


def main(words: Sequence[str]) -> None:
    """Print what can be trained; with `--details`, what each part takes; with `--check`, what is proved of a family."""
    args = parse(words)
    if args.details:
        from vlm.cli.model_details import list_details  # torch is slow to import

        list_details()
    elif args.check is None:
        list_models()
    else:
        from vlm.cli.model_check import check  # a small model and its processor are slow to import

        try:
            check(
                args.check, trust_remote_code=args.trust_remote_code, json_file=args.json, markdown_file=args.markdown
            )
        except (ValueError, OSError) as error:
            sys.exit(f"vlm models: {presentable(error)}")


def parse(words: Sequence[str]) -> Namespace:
    """Return the options of the command line."""
    purpose = "Parts and types of models that can be trained, and what was proved of each."
    parser = PresentableParser("vlm models", description=purpose)
    parser.add_argument(
        "--details", action="store_true", help="what connectors, heads and families are and take; takes seconds longer"
    )
    told = (
        "prove on a small model what training takes for granted of a model (a name on the Hub or a folder), of a "
        "model_type, or of `all` types of the installed transformers; the exit status is 1 where a proof fails"
    )
    parser.add_argument("--check", metavar="MODEL", help=told)
    parser.add_argument("--trust-remote-code", action="store_true", help="let code of the repository of MODEL run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --check: write the verdicts to a file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="with --check: write a page with their table")
    args = parser.parse_args(words)
    if args.check is None and (args.json or args.markdown or args.trust_remote_code):
        parser.error("--json, --markdown and --trust-remote-code need --check")
    return args
