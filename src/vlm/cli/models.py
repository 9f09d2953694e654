"""The subcommand `vlm models`: lists parts and types of models, with what was proved of each."""

from argparse import Namespace
from collections.abc import Sequence

from vlm.cli.model_listing import list_models
from vlm.config.shown import PresentableParser


def main(words: Sequence[str]) -> None:
    """Print what can be trained; with `--details`, what each part and family takes."""
    args = parse(words)
    if args.details:
        from vlm.cli.model_details import list_details  # torch is slow to import

        list_details()
    else:
        list_models()


def parse(words: Sequence[str]) -> Namespace:
    """Return the options of the command line."""
    purpose = "Parts and types of models that can be trained, and what was proved of each."
    parser = PresentableParser("vlm models", description=purpose)
    parser.add_argument(
        "--details", action="store_true", help="what connectors, heads and families are and take; takes seconds longer"
    )
    return parser.parse_args(words)
