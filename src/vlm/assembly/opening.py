"""Contexts for a library that opens a checkpoint: errors name the checkpoint, and loading reports are silent."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
MAX_MESSAGE = 300
"""Maximum number of characters of a library's message that an error repeats."""


@contextmanager
def opening(label: str | Path, what: str = "the checkpoint") -> Iterator[None]:
    """Turn errors of a library that opens files of a checkpoint into a ValueError that names the checkpoint.

    The error itself is the cause of the ValueError, and is logged with its traceback at level debug.

    Args:
        label: the folder, name or option that messages begin with.
        what: what is opened, such as `its tokenizer`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizers' panics derive from BaseException
        said = " ".join(str(error).split())
        if isinstance(error, ValueError | OSError) and said.startswith(str(label)):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        logger.debug("%s: cannot open %s", label, what, exc_info=True)
        if isinstance(error, ValueError) and said.startswith(str(label).rpartition("=")[2]):
            raise ValueError(f"{label}: {said}") from error
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{label}: cannot open {what}: {kind}{shorten(said)}{_own_line(error)}") from error


def _own_line(error: BaseException) -> str:
    """Return the line of this package that raised an unexpected error, which may be a bug."""
    if isinstance(error, ValueError | OSError):
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(last.filename)
    if not file.is_relative_to(PACKAGE):
        return ""
    return f" (at {file.relative_to(PACKAGE.parent)}:{last.lineno}; log level debug shows the traceback)"


def shorten(text: str) -> str:
    """Return a library's message for an error: short, without control characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from logging what callers report themselves."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
