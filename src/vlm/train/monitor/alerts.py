"""Tells the user how a run ended, by a command of the user's own (`trainer.alert_command`).

The command is started without a shell, on rank 0, with the event as JSON on its standard input and in the environment.
It may take `ALERT_SECONDS`; its outcome never affects the run. Imports the standard library only.
"""

import json
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from tempfile import TemporaryFile

log = logging.getLogger(__name__)

ALERT_SECONDS = 30.0
"""How long the command may take, in seconds; then it is killed with all processes that it started."""
MAX_SHOWN = 500
"""How many bytes of a failed command's output are logged."""


def send_alert(command: Sequence[str], event: Mapping[str, object], seconds: float = ALERT_SECONDS) -> bool:
    """Run the user's command about an event; return whether it ended with exit code 0. It raises nothing.

    Args:
        command: the program and its arguments; empty: nothing is run.
        event: what happened: `event`, `run`, `step`, `message` and others. Those whose values are text or numbers are
            in the environment too, as `VLM_EVENT`, `VLM_RUN` and so on.
        seconds: how long it may take.
    """
    if not command:
        return False
    named = {f"VLM_{key.upper()}": str(value) for key, value in event.items() if isinstance(value, str | int | float)}
    problem = f"it took longer than {seconds:g} s and was killed"
    try:
        with TemporaryFile() as printed:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                env=os.environ | named,
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps(event).encode(), timeout=seconds)
                problem = f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.returncode == 0:
                return True
            printed.seek(0)
            problem += f"; {printed.read(MAX_SHOWN).decode(errors='replace').strip()}"
    except (OSError, ValueError) as error:  # ValueError: a null character in a word
        problem = str(error)
    log.warning("trainer.alert_command: %s failed (%s); the run is not affected", command[0], problem.rstrip("; "))
    return False
