"""Gradio components and event options that several tabs share."""

from pathlib import Path
from typing import Any

import gradio as gr

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
"""Options of an event that programs cannot call."""
QUIET = {**PRIVATE, "show_progress": "hidden"}
"""Options of an event that shows no progress."""
RUNS_MODEL = {**PRIVATE, "concurrency_id": "model", "concurrency_limit": 1}
"""Options of an event that runs the model: one at a time."""


def checkpoint_dropdown(names: list[str], label: str, missing: str, outputs: Path, elem_id: str) -> gr.Dropdown:
    """Return a field that offers checkpoints, the first one chosen, and takes any path or Hub name.

    Where there are no checkpoints, it says what is `missing`, such as `No run`.
    """
    info = "Choose one, or type a folder or a name on the Hub"
    if not names:
        info = f"{missing} found under {outputs}/ yet: type a folder or a name on the Hub"
    value = next(iter(names), None)
    return gr.Dropdown(names, value=value, allow_custom_value=True, label=label, elem_id=elem_id, info=info)
