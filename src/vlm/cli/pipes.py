"""A process ends without a message when the reader of its output has gone, as in `vlm data show | head -1`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

CLOSED_PIPE_STATUS = 141
"""The exit status that shells report of other tools then: 128 plus the number of SIGPIPE."""


class PipeOutput:
    """A text stream that raises SystemExit where its pipe is closed, which `except Exception` does not catch.

    SIGPIPE itself is left alone: it would also end a process over a connection that some client has closed.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        with self._end_if_closed():
            return self._stream.write(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._end_if_closed():
            self._stream.flush()

    @contextmanager
    def _end_if_closed(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # Python writes what is still buffered when it ends
            os.close(null)
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
