"""The tab *Compare*: runs side by side."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from vlm.runs.read import RunDirectory
from vlm.web.compare_html import comparison_html
from vlm.web.components import QUIET, heading
from vlm.web.html import note_html
from vlm.web.runs import find_run, find_runs

MAX_RUNS = 8
"""Runs that are compared at once: a figure has as many colours."""
EMPTY_TEXT = "Choose two runs or more. The comparison appears here."


def build(outputs: Path, tab: gr.Tab) -> None:
    """Build the tab."""
    heading("Compare", "What differs between runs, and whether it made a difference.")
    chosen = gr.Dropdown(
        _names(outputs),
        value=[],
        multiselect=True,
        max_choices=MAX_RUNS,
        label="Runs",
        elem_id="compare-runs",
        info=f"Two to {MAX_RUNS} of the runs in {outputs}/",
    )
    shown = gr.HTML(note_html(EMPTY_TEXT), elem_id="compare-shown")
    chosen.change(lambda names: compare(outputs, names), chosen, shown, **QUIET)
    tab.select(lambda: gr.update(choices=_names(outputs)), None, chosen, trigger_mode="always_last", **QUIET)


def compare(outputs: Path, names: Sequence[str] | None) -> str:
    """Return the comparison of the runs of these names as HTML; names of no run below the folder are left out."""
    runs = [find_run(outputs, name) for name in (names or [])[:MAX_RUNS]]
    found = [RunDirectory(run.folder, run.name) for run in runs if run is not None]
    return note_html(EMPTY_TEXT) if len(found) < 2 else comparison_html(found)


def _names(outputs: Path) -> list[str]:
    return [run.name for run in find_runs(outputs)]
