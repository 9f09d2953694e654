"""Records the course of a run: its `run.log`, and how it ended in `status.json`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from vlm.clusters.processes import SAVED_EXIT_CODE
from vlm.runs.status_line import DONE, FAILED, REFUSED, STARTING, STOPPED
from vlm.train.guards.errors import GuardStop
from vlm.train.monitor.alerts import send_alert
from vlm.train.monitor.run_log import RunLog
from vlm.train.monitor.status import RunStatus

DIVERGED, STUCK = "diverged", "stuck"
"""Events of an alert besides the final states of a run: a guard ended it, or no rank made progress."""


@contextmanager
def record_run(
    folder: Path, run_log: RunLog, alert_command: Sequence[str], *, is_writer: bool, is_resumed: bool = False
) -> Iterator[RunStatus]:
    """Context that keeps a run's log and status; at its end, the status and an alert say how the run ended.

    Args:
        folder: the run directory.
        run_log: receives all log messages, on every rank.
        alert_command: `trainer.alert_command`.
        is_writer: whether this rank writes the status and runs the command.
        is_resumed: whether the run goes on with an earlier start in its directory.
    """
    run_log.open(folder)
    status = RunStatus(folder if is_writer else None, is_resumed=is_resumed)
    alert = partial(send_alert, alert_command) if is_writer else partial(send_alert, ())
    status.update(state=STARTING)
    try:
        yield status
    except BaseException as error:
        status.update(state=_find_end_state(error, status), message=describe_end(error))
        alert(describe_event(DIVERGED if isinstance(error, GuardStop) else str(status.values["state"]), status))
        raise
    status.update(state=DONE, seconds_left=0)
    alert(describe_event(DONE, status))


def describe_event(event: str, status: RunStatus) -> dict[str, object]:
    """Return the content of an alert: the event, the run directory, and its status."""
    return {"event": event, "run": str(status.folder), **status.values}


def record_stuck(status: RunStatus, alert_command: Sequence[str], reason: str) -> None:
    """Record that a run, which the watchdog is about to end, has failed, and alert the user."""
    status.update(state=FAILED, message=reason)
    send_alert(alert_command, describe_event(STUCK, status))


def _find_end_state(error: BaseException, status: RunStatus) -> str:
    """Return the final state of a run that an error ended."""
    if is_stop(error):
        return STOPPED
    has_begun = status.values["max_steps"] is not None  # that is known from the beginning of training on
    return REFUSED if isinstance(error, ValueError) and not has_begun else FAILED


def is_stop(error: BaseException) -> bool:
    """Return whether somebody stopped the run, which can be resumed."""
    if isinstance(error, SystemExit):
        return error.code == SAVED_EXIT_CODE or (isinstance(error.code, int) and error.code > 128)
    return isinstance(error, KeyboardInterrupt)


def describe_end(error: BaseException) -> str:
    """Return in one line what ended a run."""
    if isinstance(error, SystemExit) and error.code == SAVED_EXIT_CODE:
        return "A signal stopped it after a checkpoint; the same command resumes it"
    lines = str(error).strip().splitlines()
    if isinstance(error, SystemExit) and str(error) == str(error.code):
        return f"exit code {error.code}"
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet_bars(*, shows_bars: bool) -> Iterator[None]:
    """Context in which transformers and the Hub's client draw bars only on a terminal; in a file they garble lines."""
    from transformers.utils import logging as transformers_logging

    if shows_bars or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
