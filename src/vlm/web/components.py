"""Gradio components and event options that several tabs share."""

from pathlib import Path
from typing import Literal, TypedDict

import gradio as gr


class PrivateEvent(TypedDict):
    """Options of an event that programs cannot call."""

    api_visibility: Literal["private"]


class QuietEvent(PrivateEvent):
    """Options of an event that shows no progress."""

    show_progress: Literal["hidden"]


class ModelEvent(PrivateEvent):
    """Options of an event that runs the model: one at a time."""

    concurrency_id: Literal["model"]
    concurrency_limit: Literal[1]


PRIVATE: PrivateEvent = {"api_visibility": "private"}
QUIET: QuietEvent = {"api_visibility": "private", "show_progress": "hidden"}
RUNS_MODEL: ModelEvent = {"api_visibility": "private", "concurrency_id": "model", "concurrency_limit": 1}


def checkpoint_dropdown(names: list[str], label: str, missing: str, outputs: Path, elem_id: str) -> gr.Dropdown:
    """Return a field that offers checkpoints, the first one chosen, and takes any path or Hub name.

    Args:
        names: the checkpoints.
        label: the field's label.
        missing: what to name as not found where there are no checkpoints, such as `No run`.
        outputs: the folder of runs.
        elem_id: the field's id in the page.
    """
    info = "Choose one, or type a folder or a name on the Hub"
    if not names:
        info = f"{missing} found under {outputs}/ yet: type a folder or a name on the Hub"
    value = next(iter(names), None)
    return gr.Dropdown(names, value=value, allow_custom_value=True, label=label, elem_id=elem_id, info=info)
