"""The page: its four tabs, and how it is served."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from vlm.web import chat, data, predict, train
from vlm.web.guard import Guard
from vlm.web.models import HeldModel
from vlm.web.runs import checkpoints

UPLOADS_SWEPT, UPLOADS_KEPT = 600, 24 * 3600
"""Seconds between looks for uploaded pictures, and after which they are removed."""


@dataclass(frozen=True)
class Settings:
    """What `vlm web` was told.

    Attributes:
        checkpoints: those to choose from besides the runs'.
        host: where the page listens.
        port: on which port.
        base: where an adapter's base lies now.
        outputs: the folder of runs.
        max_upload: the largest file that may be uploaded, such as `20mb`.
        trust_remote_code: let code out of checkpoints run.
    """

    checkpoints: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 7860
    base: Sequence[str] = ()
    outputs: Path = Path("outputs")
    max_upload: str = "20mb"
    trust_remote_code: bool = False


def build(settings: Settings) -> gr.Blocks:
    """Lay the page out."""
    held = HeldModel(settings.base, trust_remote_code=settings.trust_remote_code)
    given, outputs = list(settings.checkpoints), settings.outputs
    with gr.Blocks(analytics_enabled=False, title="vlm", delete_cache=(UPLOADS_SWEPT, UPLOADS_KEPT)) as page, gr.Tabs():
        with gr.Tab("Chat", id="chat") as tab:
            _keep_new(tab, page, chat.build(outputs, given, held), partial(checkpoints, outputs, given, heads=False))
        with gr.Tab("Predict", id="predict") as tab:
            _keep_new(tab, page, predict.build(outputs, given, held), partial(checkpoints, outputs, given, heads=True))
        with gr.Tab("Train", id="train") as tab:
            _keep_new(tab, page, train.build(outputs, held, page), partial(checkpoints, outputs, given))
        with gr.Tab("Data", id="data") as tab:
            _keep_new(tab, page, data.build(outputs), partial(checkpoints, outputs, given))
    return page


def _keep_new(tab: gr.Tab, page: gr.Blocks, choice: gr.Dropdown, found: Callable[[], list[str]]) -> None:
    """Offer the checkpoints of runs that have ended since the page was laid out."""
    known = gr.State(found())

    def look(before: list[str]) -> tuple[Any, list[str]]:
        now = found()
        return (gr.skip() if now == before else gr.update(choices=now)), now  # a list that is open is not redrawn

    gr.on([page.load, tab.select], look, known, [choice, known], show_progress="hidden", api_visibility="private")


def serve(page: gr.Blocks, settings: Settings) -> str:
    """Serve the page from a thread of its own; returns its address.

    Nothing of it comes from or goes to another address: no sharing, no telemetry, no fonts from elsewhere, no server
    for other programs; of files only what was uploaded is given out.
    """
    system = ["ui-sans-serif", "system-ui", "sans-serif"]
    fixed = ["ui-monospace", "Consolas", "monospace"]
    uploads = [get_upload_folder()]  # served anyway; without any, Gradio would take some from the environment
    _, address, _ = page.launch(
        server_name=settings.host, server_port=settings.port, share=False, prevent_thread_lock=True, quiet=True,
        inbrowser=False, show_error=True, footer_links=[], run_history=False, enable_monitoring=False, pwa=False,
        mcp_server=False, ssr_mode=False, max_file_size=settings.max_upload, allowed_paths=uploads,
        theme=gr.themes.Default(font=system, font_mono=fixed).set(
            body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600",
            input_placeholder_color="*neutral_500", body_text_color_subdued_dark="*neutral_400",
            block_info_text_color_dark="*neutral_400",
        ),
        css=resources.files("vlm.web").joinpath("style.css").read_text(encoding="utf-8"),
        app_kwargs={"middleware": [Middleware(Guard, host=settings.host)]},
    )  # fmt: skip
    return address
