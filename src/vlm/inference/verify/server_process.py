"""An engine's own server, started for a comparison on a free port of this machine, and ended behind it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

STARTING_SECONDS = 1800
"""How long a server may take to load a model and compile its kernels."""

ENDING_SECONDS = 60


@contextmanager
def started_server(command: Sequence[str], log: Path) -> Iterator[str]:
    """Start `python -m COMMAND --host 127.0.0.1 --port N`; yield its address once it answers.

    Args:
        command: the module and its options.
        log: the file of what the server prints.

    Raises:
        ValueError: the server ends before it answers, or does not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for_models(url, process, log)
        yield url
    finally:
        _end(process)


def _wait_for_models(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["nothing"]
            raise ValueError(f"the server ended with code {process.returncode} before it answered: {lines[-1][:300]}")
        try:
            with urlopen(f"{url}/v1/models", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise ValueError(f"the server did not answer within {STARTING_SECONDS} seconds")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(ENDING_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
