"""The report of a run, written when it ends, however that is; on the first rank."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.clusters.processes import GUARD_EXIT_CODE
from vlm.runs.files import Folder, text_at
from vlm.runs.metrics import METRICS_FILE
from vlm.runs.read import PARTS_FILE
from vlm.runs.report import try_to_write_report
from vlm.runs.status_line import DONE, FAILED, REFUSED, STATUS_FILE, STOPPED
from vlm.train.parts import Part, describe
from vlm.train.run_directory import CONFIG_FILE, write_json

log = logging.getLogger(__name__)


def write_parts(folder: Path, parts: list[Part]) -> None:
    """Write `parts.json`: which parts the model has, and what trains at which rate."""
    write_json(folder / PARTS_FILE, {"parts": [describe(part) for part in parts]})


@contextmanager
def reporting(folder: Path, *, is_writer: bool) -> Iterator[None]:
    """Write `report.html` when a run ends within, done or not; nothing that goes wrong with it has an effect."""
    state = FAILED
    try:
        yield
        state = DONE
    except SystemExit as stop:
        state = FAILED if stop.code == GUARD_EXIT_CODE else STOPPED
        raise
    finally:
        report = None
        is_refused = text_at(Folder(folder).json(STATUS_FILE), "state") == REFUSED  # it has nothing to report
        if is_writer and not is_refused and (folder / CONFIG_FILE).is_file():
            report = try_to_write_report(folder, state)
        has_trained = (folder / METRICS_FILE).is_file()
        if report is not None and has_trained and state != DONE:  # the last lines of a run that is done name it
            log.info("Report: %s", report)
