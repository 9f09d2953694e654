"""Gradio components and event options that several tabs share."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
"""Options of an event that programs cannot call."""
QUIET = {**PRIVATE, "show_progress": "hidden"}
"""Options of an event that shows no progress."""
RUNS_MODEL = {**PRIVATE, "concurrency_id": "model", "concurrency_limit": 1}
"""Options of an event that runs the model: one at a time."""


def heading(title: str, text: str) -> gr.HTML:
    """Return the heading of a tab, with a line on what the tab is for."""
    return gr.HTML(f"<h2>{escape(title)}</h2><p>{escape(text)}</p>", elem_classes="vlm-heading", padding=False)


def checkpoint_dropdown(names: list[str], label: str, missing: str, outputs: Path, elem_id: str) -> gr.Dropdown:
    """Return a field that offers checkpoints, the first one chosen, and takes any path or Hub name.

    Where there are no checkpoints, it says what is `missing`, such as `finished run`.
    """
    info = "Choose one, or type a folder or a Hub name"
    if not names:
        info = f"No {missing} in {outputs}/ yet. Type a folder or a Hub name"
    value = next(iter(names), None)
    return gr.Dropdown(names, value=value, allow_custom_value=True, label=label, elem_id=elem_id, info=info)
