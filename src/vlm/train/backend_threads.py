"""The end of a process in which threads of process groups are left. Imports the standard library only.

Under ZeRO-2 and ZeRO-3 they are: DeepSpeed stores process groups in every parameter, in the contexts that made the
model and in its optimiser, all of which its patched module classes keep alive, and it offers nothing to release them.
A thread of gloo that frees a tensor while the interpreter ends makes the process abort after its work is done
("terminate called without an active exception", about once in 65 runs).
"""

import atexit
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

NAMES = ("gloo", "pt_gloo", "pt_nccl")
"""How the names of threads of process groups begin."""


def backend_threads() -> list[str]:
    """Return the names of this process's threads that serve process groups; none where there is no `/proc`."""
    names: list[str] = []
    for file in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # a thread that has ended meanwhile
            names.append(file.read_text().strip())
    return [name for name in names if name.startswith(NAMES)]


def end_with_backend_threads(error: BaseException | None = None) -> None:
    """End the process as `error` would where threads of process groups are left, else return.

    Everything is written and every rank is past its last barrier, or this one has failed. What is registered to run at
    the end runs, and what was printed is written; only the interpreter's own end is left out.
    """
    if not backend_threads():
        return
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
