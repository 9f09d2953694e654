"""`status.json` of a run directory: the current state of a run, for people and programs outside.

The file is replaced as a whole at the start of a run, at each log, and at its end. Between two logs it is renewed after
a step if it is older than `RENEWAL_SECONDS`. Imports no torch.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlm.runs.durations import seconds_of_starts
from vlm.runs.files import Folder
from vlm.runs.status_line import STARTING, STATUS_FILE

RENEWAL_SECONDS = 5.0
"""The maximum age of the file during training, in seconds."""

EMPTY: dict[str, object] = {
    "state": STARTING, "step": None, "max_steps": None, "epoch": None, "loss": None, "loss_trend": None,
    "seconds_left": None, "tokens_per_second": None, "mfu": None, "memory_bytes": None, "waiting_share": None,
    "learning_rates": {}, "started_at": None, "earlier_seconds": 0.0, "updated_at": None, "host": None, "pid": None,
    "message": None,
}  # fmt: skip


class RunStatus:
    """The status of a run. It is written by the rank that has a `folder`; with None, nothing is written.

    Args:
        folder: the run directory.
        is_resumed: whether the run goes on with the one in its directory, whose duration so far is then kept.
    """

    def __init__(self, folder: Path | None = None, *, is_resumed: bool = False):
        self.folder = folder
        self.values = EMPTY | {"started_at": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        if folder is not None and is_resumed:
            self.values["earlier_seconds"] = seconds_of_starts(Folder(folder).json(STATUS_FILE))

    def update(self, **values: object) -> None:
        """Set new values, and write the file; a disk that is full or unreachable for a while does not end the run."""
        self.values |= values | {"updated_at": time.time()}
        if self.folder is not None:
            with suppress(OSError):
                partial = self.folder / f".{STATUS_FILE}.partial"
                partial.write_text(f"{json.dumps(self.values, indent=2)}\n", encoding="utf-8")
                partial.replace(self.folder / STATUS_FILE)

    def renew(self, **values: object) -> None:
        """Set new values, and write the file if it is older than `RENEWAL_SECONDS`."""
        updated = self.values["updated_at"]
        if not isinstance(updated, float) or time.time() - updated >= RENEWAL_SECONDS:
            self.update(**values)
        else:
            self.values |= values

    @contextmanager
    def during(self, state: str) -> Iterator[None]:
        """Context in which the run is in another state."""
        before = self.values["state"]
        self.update(state=state)
        try:
            yield
        finally:
            self.update(state=before)
