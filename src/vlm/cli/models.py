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
    if args.name is not None and (args.details or args.check):
        sys.exit(f"vlm models: {args.name}: a name filters the list; leave out --details and --check")
    if args.details:
        from vlm.cli.model_details import list_details  # torch is slow to import

        list_details()
    elif args.check is None:
        try:
            list_models(args.name)
        except ValueError as error:
            sys.exit(f"vlm models: {presentable(error)}")
    else:
        from vlm.cli.model_check import check  # a small model and its processor are slow to import

        try:
            check(
                args.check, trust_remote_code=args.trust_remote_code, json_file=args.json, markdown_file=args.markdown
            )
        except (ValueError, OSError) as error:
            sys.exit(f"vlm models: {presentable(error)}")


def make_parser() -> PresentableParser:
    """Return the parser of `vlm models`."""
    purpose = "List the parts and models that can be trained, and which of them were tested."
    examples = ("vlm models", "vlm models qwen", "vlm models --check HuggingFaceTB/SmolVLM-256M-Instruct")
    parser = PresentableParser("vlm models", "vlm models [NAME] [options]", purpose, examples=examples)
    parser.add_argument("name", nargs="?", metavar="NAME", help="list only those whose name contains this")
    parser.add_argument("--details", action="store_true", help="also describe connectors, heads and families (slower)")
    told = (
        "test on a small model that training handles a model (a Hub name or folder), a model_type, or `all` types of "
        "the installed transformers; the exit status is 1 if a test fails"
    )
    parser.add_argument("--check", metavar="MODEL", help=told)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code that comes with MODEL to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --check: write the results to a file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="with --check: write a table of the results")
    return parser


def parse(words: Sequence[str]) -> Namespace:
    """Return the options of the command line."""
    parser = make_parser()
    args = parser.parse_args(words)
    if args.check is None and (args.json or args.markdown or args.trust_remote_code):
        parser.error("--json, --markdown and --trust-remote-code need --check")
    return args
