"""`run.log` of a run directory: everything that a run and its libraries log, with the time, and tracebacks.

The terminal shows this package's own messages and the errors of libraries; warnings and notes of libraries go to the
file only. Rank 0 writes `run.log`; another rank writes `run.log.rankN`, and only if it warns or fails. Messages from
before the run directory is known are kept, and written once it is. Each line is flushed, so that a killed run loses
none. Imports the standard library and tqdm only, because it listens before torch is imported.
"""

import faulthandler
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TypeGuard

from tqdm import tqdm

from vlm.clusters.processes import SAVED_EXIT_CODE

LOG_FILE = "run.log"
LINE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
OWN = "vlm"
"""The logger of this package."""
IN_PLACE = "in_place"
"""The attribute of a record that the terminal shows in its own way, so that the console handler skips it."""
MAX_KEPT = 100_000
"""The maximum number of records that are kept before the run directory is known."""
STANDARD_STREAMS = ("<stdout>", "<stderr>")


log = logging.getLogger(__name__)


class RunLog:
    """Collects log messages while it is entered; `open` names their file.

    Attributes:
        file: the open log file; None if nothing was written, or the run directory is not known yet.
    """

    def __init__(self, rank: int | None = None):
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self.kept = MemoryHandler(MAX_KEPT, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self.handler: logging.FileHandler | None = None
        self._undo = ExitStack()

    @property
    def path(self) -> Path | None:
        """The log file, or None if the run directory is not known yet."""
        return None if self.handler is None else Path(self.handler.baseFilename)

    def __enter__(self) -> "RunLog":
        """Listen to every logger and to Python's warnings."""
        root = logging.getLogger()
        self._add(root, self.kept)
        errors = logging.StreamHandler(sys.stderr)
        errors.setLevel(logging.ERROR)
        errors.addFilter(lambda record: not is_own(record))
        errors.setFormatter(logging.Formatter("[%(levelname)s] %(name)s: %(message)s"))
        self._add(root, errors)
        own = logging.getLogger(OWN)
        self._undo.callback(setattr, own, "handlers", own.handlers)
        own.handlers = [ConsoleHandler(handler.stream) if is_console(handler) else handler for handler in own.handlers]
        logging.captureWarnings(True)
        self._undo.callback(logging.captureWarnings, False)
        self.take_over_libraries()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Write the traceback of the error that ended the run, and restore the loggers."""
        if error is not None and not (isinstance(error, SystemExit) and error.code in (0, None, SAVED_EXIT_CODE)):
            log.error("The run ended with an error", exc_info=error, extra={IN_PLACE: True})
        if self.handler is None:
            self._show_kept_warnings()
        elif faulthandler.is_enabled() and self._owns_faults:
            faulthandler.disable()
        self._undo.close()
        self.kept.close()

    def open(self, folder: Path) -> None:
        """Write earlier messages, and all further ones, to the log file of a run directory."""
        if self.handler is not None:
            return
        name = LOG_FILE if self.rank == 0 else f"{LOG_FILE}.rank{self.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        self.handler = logging.FileHandler(folder / name, encoding="utf-8", errors="backslashreplace", delay=True)
        self.handler.setFormatter(logging.Formatter(LINE_FORMAT))
        if self.rank:
            self.handler.setLevel(logging.WARNING)
        self.kept.setTarget(self.handler)
        self.kept.flush()
        logging.getLogger().removeHandler(self.kept)
        self._add(logging.getLogger(), self.handler)
        self._undo.callback(self.handler.close)
        self.take_over_libraries()
        self._write_faults_to_file()

    def take_over_libraries(self) -> None:
        """Make libraries that print their own log pass it on instead; some start to print when they are imported."""
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if name.split(".")[0] == OWN or not isinstance(logger, logging.Logger):
                continue
            for handler in filter(is_console, list(logger.handlers)):
                logger.removeHandler(handler)
                self._undo.callback(logger.addHandler, handler)
                self._undo.callback(setattr, logger, "propagate", logger.propagate)
                logger.propagate = True

    def _add(self, logger: logging.Logger, handler: logging.Handler) -> None:
        logger.addHandler(handler)
        self._undo.callback(logger.removeHandler, handler)

    _owns_faults = False

    def _write_faults_to_file(self) -> None:
        """Write the stacks to the file if the system ends the process, for example on an invalid memory access."""
        if self.rank == 0 and self.handler is not None and not faulthandler.is_enabled():
            self.handler.acquire()
            try:
                if self.handler.stream is None:
                    self.handler.stream = self.handler._open()
            finally:
                self.handler.release()
            faulthandler.enable(self.handler.stream)
            self._owns_faults = True

    def _show_kept_warnings(self) -> None:
        """Print the kept warnings of libraries if no run directory was opened."""
        shown = logging.StreamHandler(sys.stderr)
        shown.setFormatter(logging.Formatter("[%(levelname)s] %(name)s: %(message)s"))
        for record in self.kept.buffer:
            if logging.WARNING <= record.levelno < logging.ERROR and not is_own(record):
                shown.handle(record)


class ConsoleHandler(logging.StreamHandler):
    """Prints notes unchanged, and warnings and errors with their level; lines do not garble progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, unless it is shown in another way."""
        if getattr(record, IN_PLACE, False):
            return
        try:
            text = self.format(record)
            tqdm.write(text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}", self.stream)
            self.flush()
        except Exception:  # as every handler does
            self.handleError(record)


def is_own(record: logging.LogRecord) -> bool:
    """Return whether this package logged a record."""
    return record.name.split(".")[0] == OWN


def is_console(handler: logging.Handler) -> TypeGuard[logging.StreamHandler]:
    """Return whether a handler prints to the standard output or error."""
    if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
        return False
    return getattr(handler.stream, "name", None) in STANDARD_STREAMS


@contextmanager
def logged(run_log: RunLog | None) -> Iterator[RunLog]:
    """Yield the given log if it is already entered, otherwise a new one that is entered here."""
    if run_log is not None:
        yield run_log
        return
    with RunLog() as own:
        yield own
