"""A reader of records that ends a process. It imports little: each worker of the tests that use it imports it anew."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from vlm.data.records.formats import read_caption
from vlm.data.sample import Sample


def killer(record: Any, folder: Path) -> Sample:
    """A reader that ends a process, once, as the file `kill` says: `self` or `parent`. What it reads is listed."""
    with (folder / "read.txt").open("a") as file:
        file.write(f"{os.getpid()} {record['id']}\n")
    order = folder / "kill"
    if record["caption"] == "deadly" and order.exists():
        victim = os.getpid() if order.read_text() == "self" else os.getppid()
        order.unlink()
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
    return read_caption(record, folder)
