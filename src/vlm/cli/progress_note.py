"""A sign of life while a command starts. Imports the standard library only."""

import os
import sys


def tell(what: str) -> None:
    """Print what begins now, such as `Loading the model`, where somebody looks at standard error in a terminal."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"{what} …", file=sys.stderr, flush=True)
