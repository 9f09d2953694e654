"""The page: its tabs, and how it is served."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from vlm.web import chat, compare, data, evaluate, export, predict, train
from vlm.web.access import Access
from vlm.web.commands import Place
from vlm.web.components import QUIET
from vlm.web.guard import RequestGuard
from vlm.web.html import header_html
from vlm.web.models import ModelHolder
from vlm.web.runs import checkpoints
from vlm.web.task_view import TaskContext

UPLOAD_SWEEP_SECONDS, UPLOAD_LIFETIME_SECONDS = 600, 24 * 3600
"""How often uploaded images are looked through, and after which time they are removed."""

ONCE_LOADED_JS = """() => {
    document.querySelector('#chat-question textarea').setAttribute('aria-label', 'Your question');
    document.addEventListener('keydown', event => {
        if (event.key === 'Tab' && event.target.matches('[role=combobox]')) event.stopPropagation();
    }, true);
}"""
"""Names the field of questions for screen readers: Gradio shows its label but does not connect it. Keeps Tab from
Gradio's lists of choices: it handles the key after the field has lost the focus, and opens the list again."""

STARTUP_PATH = "/gradio_api/startup-events"
"""What Gradio asks itself for when it begins to listen, without a secret; it does nothing after the first time."""


@dataclass(frozen=True)
class PageSettings:
    """The options of `vlm web`, whose help says what they mean."""

    checkpoints: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 7860
    base: Sequence[str] = ()
    outputs: Path = Path("outputs")
    max_upload: str = "20mb"
    trust_remote_code: bool = False
    access: Access = field(default_factory=Access)


def build(settings: PageSettings) -> gr.Blocks:
    """Build the page."""
    outputs, sweep = settings.outputs, (UPLOAD_SWEEP_SECONDS, UPLOAD_LIFETIME_SECONDS)
    with gr.Blocks(analytics_enabled=False, title="vlm", delete_cache=sweep) as page:
        gr.HTML(header_html(outputs), elem_classes="vlm-top", padding=False)
        _build_tabs(settings, page)
        page.load(None, None, None, js=ONCE_LOADED_JS, **QUIET)
    return page


def _build_tabs(settings: PageSettings, page: gr.Blocks) -> None:
    trusted = settings.checkpoints if settings.trust_remote_code else ()
    holder, outputs = ModelHolder(settings.base, trusted), settings.outputs
    with gr.Tabs():
        context = TaskContext(page, Place(outputs, settings.base, frozenset(trusted)), holder)
        # Tab -> its builder, which takes the checkpoints to offer, and whether those have heads.
        tabs: dict[str, tuple[Callable[[list[str]], gr.Dropdown], bool | None]] = {
            "Chat": (partial(chat.build, outputs, holder), False),
            "Predict": (partial(predict.build, outputs, holder), True),
            "Train": (partial(train.build, outputs, holder, page), None),
            "Evaluate": (partial(evaluate.build, outputs, context), False),
            "Export": (partial(export.build, outputs, context), None),
            "Data": (data.build, None),
        }
        for name, (build_tab, heads) in tabs.items():
            find_checkpoints = partial(checkpoints, outputs, settings.checkpoints, heads=heads)
            if name == "Evaluate":  # compared once trained
                with gr.Tab("Compare", id="compare") as tab:
                    compare.build(outputs, tab)
            with gr.Tab(name, id=name.lower()) as tab:
                _refresh_choices(tab, page, build_tab(find_checkpoints()), find_checkpoints)


def _refresh_choices(
    tab: gr.Tab, page: gr.Blocks, field: gr.Dropdown, find_checkpoints: Callable[[], list[str]]
) -> None:
    """Offer the checkpoints of runs that have ended since the page was built."""
    known = gr.State(find_checkpoints())

    def refresh(earlier: list[str]) -> tuple[object, list[str]]:
        """Return the choices as they are now, if they are others than before, and remember them."""
        now = find_checkpoints()
        return (gr.skip() if now == earlier else gr.update(choices=now)), now  # an open list is not redrawn

    # always_last: a tab that is opened while the page still loads is refreshed after that, not passed over
    gr.on([page.load, tab.select], refresh, known, [field, known], trigger_mode="always_last", **QUIET)


def serve(page: gr.Blocks, settings: PageSettings) -> str:
    """Serve the page from a separate thread; return its address, with the token that opens it.

    Nothing comes from or goes to another address: no sharing, no telemetry, no fonts from elsewhere, no server for
    other programs. Uploaded files are the only files served.
    """
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    fixed_fonts = ["ui-monospace", "Consolas", "monospace"]
    uploads = [get_upload_folder()]  # served anyway; an empty list would make Gradio read one from the environment
    _, address, _ = page.launch(
        server_name=settings.host, server_port=settings.port, share=False, prevent_thread_lock=True, quiet=True,
        inbrowser=False, show_error=True, footer_links=[], run_history=False, enable_monitoring=False, pwa=False,
        mcp_server=False, ssr_mode=False, max_file_size=settings.max_upload, allowed_paths=uploads,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=fixed_fonts).set(
            body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600",
            input_placeholder_color="*neutral_500", body_text_color_subdued_dark="*neutral_400",
            block_info_text_color_dark="*neutral_400", button_large_text_size="*text_md",
            button_large_padding="0.5rem 1rem",
        ),
        css=resources.files("vlm.web").joinpath("style.css").read_text(encoding="utf-8"),
        app_kwargs={"middleware": [
            Middleware(RequestGuard, host=settings.host, access=settings.access, open_paths=[STARTUP_PATH])
        ]},
    )  # fmt: skip
    return f"{address}?token={settings.access.token}"
