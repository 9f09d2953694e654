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
from vlm.web.guard import RequestGuard
from vlm.web.models import ModelHolder
from vlm.web.runs import checkpoints

UPLOAD_SWEEP_SECONDS, UPLOAD_LIFETIME_SECONDS = 600, 24 * 3600
"""Seconds between looks for uploaded images, and after which they are removed."""


@dataclass(frozen=True)
class PageSettings:
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


def build(settings: PageSettings) -> gr.Blocks:
    """Lay the page out."""
    model_holder = ModelHolder(settings.base, trust_remote_code=settings.trust_remote_code)
    extra_checkpoints, outputs = list(settings.checkpoints), settings.outputs
    with (
        gr.Blocks(
            analytics_enabled=False, title="vlm", delete_cache=(UPLOAD_SWEEP_SECONDS, UPLOAD_LIFETIME_SECONDS)
        ) as page,
        gr.Tabs(),
    ):
        with gr.Tab("Chat", id="chat") as tab:
            _refresh_choices(
                tab,
                page,
                chat.build(outputs, extra_checkpoints, model_holder),
                partial(checkpoints, outputs, extra_checkpoints, heads=False),
            )
        with gr.Tab("Predict", id="predict") as tab:
            _refresh_choices(
                tab,
                page,
                predict.build(outputs, extra_checkpoints, model_holder),
                partial(checkpoints, outputs, extra_checkpoints, heads=True),
            )
        with gr.Tab("Train", id="train") as tab:
            _refresh_choices(
                tab, page, train.build(outputs, model_holder, page), partial(checkpoints, outputs, extra_checkpoints)
            )
        with gr.Tab("Data", id="data") as tab:
            _refresh_choices(tab, page, data.build(outputs), partial(checkpoints, outputs, extra_checkpoints))
    return page


def _refresh_choices(
    tab: gr.Tab, page: gr.Blocks, choice: gr.Dropdown, find_checkpoints: Callable[[], list[str]]
) -> None:
    """Offer the checkpoints of runs that have ended since the page was laid out."""
    known = gr.State(find_checkpoints())

    def refresh(before: list[str]) -> tuple[Any, list[str]]:
        now = find_checkpoints()
        return (gr.skip() if now == before else gr.update(choices=now)), now  # a list that is open is not redrawn

    gr.on([page.load, tab.select], refresh, known, [choice, known], show_progress="hidden", api_visibility="private")


def serve(page: gr.Blocks, settings: PageSettings) -> str:
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
        app_kwargs={"middleware": [Middleware(RequestGuard, host=settings.host)]},
    )  # fmt: skip
    return address
