"""Shows the progress of long work: as a bar on a terminal, as a line every half minute in a file.

A bar is gone when the work is done. Lines go to the log, so that bars and log lines never share one.
"""

import logging
import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0


class _LogLines:
    """What a bar writes, as lines of the log."""

    def write(self, text: str) -> int:
        """Log a text that is not blank."""
        if line := text.strip():
            log.info("%s", line)
        return len(text)

    def flush(self) -> None:
        """Do nothing: the log is flushed line by line."""


def show_progress(
    items: Iterable[T],
    title: str,
    total: int | None = None,
    *,
    initial: int = 0,
    unit: str = "",
    silent: bool = False,
) -> "tqdm[T]":
    """Return an iterable over items that shows how far it is; a caller that has none gives `()` and calls `update`.

    Args:
        items: what is worked on.
        title: what is done, such as `counting tokens`.
        total: the number of items; None: their length, where they have one.
        initial: the number of items that are done already.
        unit: what an item is, in the singular.
        silent: show nothing, as on all ranks but the first.
    """
    common = {"desc": title, "total": total, "initial": initial, "leave": False, "disable": silent}
    if shows_bars():
        return tqdm(items, unit=f" {unit}" if unit else "", dynamic_ncols=True, **common)
    units = f" {unit}{'es' if unit.endswith('ch') else 's'}" if unit else ""
    return tqdm(
        items,
        file=_LogLines(),
        mininterval=SECONDS_BETWEEN_LINES,
        maxinterval=2 * SECONDS_BETWEEN_LINES,
        delay=SECONDS_BETWEEN_LINES,
        bar_format=f"{{desc}}: {{n_fmt}} of {{total_fmt}}{units}, {{remaining}} left",
        **common,
    )


def shows_bars() -> bool:
    """Return whether output goes to a terminal that a line can be rewritten on."""
    return sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
