"""The tab *Train*: a new run from fields and overrides, and the existing runs."""

from pathlib import Path
from typing import NamedTuple

import gradio as gr

from vlm.config.packaged import read_run_description, run_names
from vlm.web import jobs
from vlm.web.components import PRIVATE, QUIET, heading
from vlm.web.html import error_html, note_html
from vlm.web.models import ModelHolder
from vlm.web.plan import HF_NAME_KEYS, PARTS, Plan, choices, choose_run_folder, format_for_shell, make_command
from vlm.web.run_view import RunView
from vlm.web.runs import MAX_RUN_DEPTH
from vlm.web.tasks import check_idle

DEFAULT_RUN = "pretrain-smol"
"""The run that is chosen at first."""


def build(outputs: Path, holder: ModelHolder, page: gr.Blocks, checkpoints: list[str]) -> gr.Dropdown:
    """Build the tab; return the field of checkpoints."""
    with gr.Tabs() as tabs:
        with gr.Tab("New run", id="new"):
            heading("New run", "Choose a run, its parts and its data. Start runs exactly the command shown.")
            form = RunForm(outputs, checkpoints)
        with gr.Tab("Runs", id="runs"):
            heading("Runs", f"Every run in {outputs}/. Select one to follow it.")
            view = RunView(outputs)
    form.start.click(
        lambda *values: form.start_run(holder, FormValues(*values)),
        form.fields,
        [*form.shown, tabs, view.selected],
        concurrency_limit=1,
        **PRIVATE,
    ).then(view.refresh, view.selected, view.shown, **QUIET)
    view.connect_events(page)
    return form.checkpoint


class FormValues(NamedTuple):
    """The values of the fields of a new run, in order; `folder` is the run directory that the user was shown."""

    run: str
    visual_encoder: str | None
    connector: str | None
    language_model: str | None
    head: str | None
    path: str | None
    images: str | None
    checkpoint: str | None
    lines: str | None
    processes: float | None
    folder: str | None

    @property
    def plan(self) -> Plan:
        """The run and its overrides."""
        keys = {"dataset.path": self.path, "dataset.image_folder": self.images}
        parts = {part: getattr(self, part) for part in PARTS}
        return Plan(self.run, parts, {**keys, "trainer.from_pretrained": self.checkpoint}, self.lines)


class RunForm:
    """The fields of a new run below `outputs`, its check, and its command; `checkpoints` are offered to start from."""

    def __init__(self, outputs: Path, checkpoints: list[str]):
        self.outputs = outputs
        self.folder = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                run = gr.Dropdown(run_names(), value=DEFAULT_RUN, label="Run", elem_id="train-run")
                description = gr.HTML(note_html(read_run_description(DEFAULT_RUN)), elem_id="train-about")
                parts = [_part_dropdown(part) for part in PARTS]
            with gr.Column(scale=1, min_width=300):
                path = gr.Textbox(label="dataset.path", placeholder="records.json", elem_id="train-path")
                beside = "Leave empty if the images are next to the records"
                images = gr.Textbox(label="dataset.image_folder", info=beside, elem_id="train-images")
                self.checkpoint = gr.Dropdown(
                    checkpoints,
                    value=None,
                    allow_custom_value=True,
                    label="trainer.from_pretrained",
                    info="Leave empty to start from the parts",
                    elem_id="train-checkpoint",
                )
                lines = gr.Textbox(
                    label="Overrides, one per line",
                    lines=5,
                    max_lines=20,
                    placeholder="trainer.num_train_epochs=1",
                    elem_id="train-lines",
                )
                processes = gr.Number(
                    1, label="Processes", info="One per GPU", precision=0, minimum=1, elem_id="train-processes"
                )
                with gr.Row():
                    check = gr.Button("Check", elem_id="train-check", min_width=100)
                    self.start = gr.Button("Start", variant="primary", elem_id="train-start", min_width=100)
        message = gr.HTML("", elem_id="train-message", elem_classes="vlm-line")
        command = gr.Code(
            label="Command",
            language="shell",
            interactive=False,
            visible=False,
            lines=3,
            wrap_lines=True,
            elem_id="train-command",
            show_line_numbers=False,
        )
        self.fields = [run, *parts, path, images, self.checkpoint, lines, processes, self.folder]
        self.shown = [message, command, self.folder]
        check.click(lambda *values: self._check(FormValues(*values)), self.fields, self.shown, **PRIVATE)
        run.change(lambda name: note_html(read_run_description(name)), run, description, **QUIET)

    def _make_command(self, values: FormValues) -> tuple[list[str], Path]:
        """Return the command of the fields and its run directory; ValueError if the fields are refused."""
        output_dir = values.plan.compose_config().trainer.output_dir
        new_folder = choose_run_folder(values.run, self.outputs, values.folder) if output_dir is None else None
        folder = new_folder or Path(str(output_dir))
        check_below(folder, self.outputs)
        return make_command(values.plan, new_folder, int(values.processes or 0)), folder

    def _check(self, values: FormValues) -> tuple[object, ...]:
        try:
            command, folder = self._make_command(values)
        except (ValueError, OSError) as error:
            return _show_error(error)
        return *_show_command(f"Ready to start. It will write to {folder}.", command), str(folder)

    def start_run(self, holder: ModelHolder, values: FormValues) -> tuple[object, ...]:
        """Start a run; return new values of `shown`, and which tab and which run to show now."""
        try:
            command, folder = self._make_command(values)
            check_idle(self.outputs)
            holder.release()
            jobs.start(command, folder)
        except (ValueError, OSError) as error:
            return *_show_error(error), gr.skip(), gr.skip()
        name = folder.relative_to(self.outputs).as_posix()
        return *_show_command(f"Started in {folder}.", command), None, gr.update(selected="runs"), name


def _part_dropdown(part: str) -> gr.Dropdown:
    options = [("from the run", ""), *choices(part)]
    is_named = part in HF_NAME_KEYS
    info = "Or type a folder or a Hub name" if is_named else None
    return gr.Dropdown(options, value="", label=part, elem_id=f"train-{part}", allow_custom_value=is_named, info=info)


def _show_error(error: Exception) -> tuple[object, ...]:
    return error_html(str(error)), gr.update(visible=False), None


def _show_command(message: str, command: list[str]) -> tuple[object, object]:
    return note_html(message), gr.update(value=format_for_shell(command), visible=True)


def check_below(folder: Path, outputs: Path) -> None:
    """Raise ValueError if the page would not find a run again."""
    real, real_outputs = folder.resolve(), outputs.resolve()
    if not (folder.is_relative_to(outputs) and real_outputs in real.parents[:MAX_RUN_DEPTH]):
        raise ValueError(
            f"trainer.output_dir={folder}: the page only finds runs in {outputs}/NAME and {outputs}/FOLDER/NAME. "
            "Choose such a folder, or start the page with another --outputs."
        )
