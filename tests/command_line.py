"""The command line, called in this process."""

import sys

import pytest

from vlm.cli.main import main


def refusal(*words: str) -> str:
    """What a command line that must be refused says."""
    before = sys.argv
    try:
        with pytest.raises(SystemExit) as stopped:
            main(words)
    finally:
        sys.argv = before
    return str(stopped.value.code)
