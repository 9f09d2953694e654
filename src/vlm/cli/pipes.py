"""What happens when the reader of a process's output has gone, as in `vlm data show | head -1`.

A command ends without a message. A training run continues: hours of work do not depend on who reads its log.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

CLOSED_PIPE_STATUS = 141
"""The exit status that shells report of other tools then: 128 plus the number of SIGPIPE."""

NO_READER = (errno.EPIPE, errno.EIO)
"""Errors of writing to a pipe without a reader, and to a terminal that has been closed."""


class PipeOutput:
    """A text stream that raises SystemExit where nobody reads it, which `except Exception` does not catch.

    SIGPIPE itself is left alone: it would also end a process over a connection that some client has closed.

    Attributes:
        ends_process: whether it does so; otherwise what is written is dropped from then on.
    """

    def __init__(self, stream: TextIO):
        self._stream, self.ends_process = stream, True

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        with self._without_reader():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._without_reader():
            self._stream.flush()

    @contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in NO_READER:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # Python writes what is still buffered when it ends
            os.close(null)
            if self.ends_process:
                sys.exit(CLOSED_PIPE_STATUS)


@contextmanager
def end_with_pipes() -> Iterator[None]:
    """Within, the process ends without a message when the reader of its output has gone."""
    output, errors = (cast(TextIO, PipeOutput(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            yield
        except BaseException:
            with suppress(SystemExit):  # the first error says more than a closed pipe
                output.flush()
            raise
        output.flush()


def outlive_pipes() -> None:
    """Let the process continue from now on when the reader of its output has gone, within `end_with_pipes`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, PipeOutput):
            stream.ends_process = False
