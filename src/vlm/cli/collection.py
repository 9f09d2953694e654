"""How often a command collects garbage. Imports the standard library only."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

USUAL = gc.get_threshold()
RARE = (10_000, 10, 10)
"""Thresholds for commands. With Python's own, 700 new objects, collections take a quarter of the time of the imports,
which bring a million objects and no garbage."""


@contextmanager
def rare_collection() -> Iterator[None]:
    """Collect garbage less often within; afterwards, as often as before."""
    before = gc.get_threshold()
    gc.set_threshold(*RARE)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage within: around imports, whose objects stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_as_usual() -> None:
    """Collect garbage as often as Python does, since training steps leave garbage that holds tensors.

    The objects that exist now are exempt from collection, also at the end of the process, which takes two seconds less
    by that; bindings that look for leaks there, such as triton's, name what is alive then. They are frozen once: a
    process may train more than once.
    """
    if not gc.get_freeze_count():
        gc.freeze()
    gc.set_threshold(*USUAL)
