"""How often a command collects garbage, and which notes of libraries it hides. Imports the standard library only."""

import atexit
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

USUAL = gc.get_threshold()
RARE = (10_000, 10, 10)
"""Thresholds for commands. With Python's own, 700 new objects, collections take a quarter of the time of the imports,
which bring a million objects and no garbage."""

DEVICE_NOTE = "Setting accelerator to CPU"


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
    by that; `hush_leak_reports` silences bindings that look for leaks there.
    """
    _freeze_once()
    gc.set_threshold(*USUAL)


@cache
def _freeze_once() -> None:
    """Exempt the objects that exist now; a process may train more than once."""
    gc.freeze()


def hush_device_notes() -> None:
    """Keep DeepSpeed from saying, when it is imported, that it found no accelerator; `vlm doctor` says so."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: not str(record.msg).startswith(DEVICE_NOTE))


def hush_leak_reports() -> None:
    """Keep triton's bindings from listing dozens of objects after the last message of a process.

    nanobind reports what is alive when the interpreter has ended, and has no switch for that in Python. Exit functions
    run in reverse order: call this before any library is imported, and theirs may still print.
    """
    atexit.register(_discard_stderr)


def _discard_stderr() -> None:
    if "triton" in sys.modules:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
