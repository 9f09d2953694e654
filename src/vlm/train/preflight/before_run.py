"""The preflight of a run that then trains (`preflight=true`): told in the log, and written into the run directory."""

import logging
from collections.abc import Sequence
from pathlib import Path

from vlm.config.schema import RunConfig
from vlm.train.distributed import on_rank0
from vlm.train.preflight.inspect import inspect_run
from vlm.train.preflight.report import as_html, as_text

log = logging.getLogger(__name__)

PREFLIGHT_FILE = "preflight.html"


def write_preflight(config: RunConfig, name: str, overrides: Sequence[str], folder: Path) -> None:
    """Inspect a run on every rank; the first one logs the page and writes `preflight.html`.

    Problems are told and stop nothing: the run meets them itself.
    """
    findings = inspect_run(config, name, overrides)

    def write() -> None:
        """Log the page and write it."""
        log.info("Before the run:\n\n%s\n", as_text(findings))
        folder.joinpath(PREFLIGHT_FILE).write_text(as_html(findings), encoding="utf-8")

    on_rank0(write)
