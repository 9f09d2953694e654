"""The garbage collector while a command starts. Imports the standard library alone."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

USUAL = gc.get_threshold()
RARE = (10_000, 10, 10)
"""At Python's 700 new objects a collection takes a quarter of the time of the imports: they bring a million objects and
no garbage."""


@contextmanager
def rare_collection() -> Iterator[None]:
    """Collect garbage less often; afterwards, as often as before."""
    before = gc.get_threshold()
    gc.set_threshold(*RARE)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def collect_as_usual() -> None:
    """Collect garbage as often as Python does, since steps leave some that holds tensors; never walk what is there now.

    What is there already stays, and is not frozen twice: a process may train more than once.
    """
    if not gc.get_freeze_count():
        gc.freeze()
    gc.set_threshold(*USUAL)
