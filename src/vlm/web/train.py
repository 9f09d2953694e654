"""The tab *Train*: a new run from fields and overrides, and the existing runs."""

from pathlib import Path
from typing import NamedTuple

import gradio as gr

from vlm.config.packaged import read_run_description, run_names
from vlm.web import jobs
from vlm.web.components import PRIVATE, QUIET
from vlm.web.html import error_html, note_html
from vlm.web.models import ModelHolder
from vlm.web.plan import HF_NAME_KEYS, PARTS, Plan, choices, choose_run_folder, format_for_shell, make_command
from vlm.web.run_view import RunView
from vlm.web.runs import find_runs

DEFAULT_RUN = "pretrain-smol"
"""The run that is chosen at first."""


def build(outputs: Path, model_holder: ModelHolder, page: gr.Blocks, checkpoints: list[str]) -> gr.Dropdown:
    """Build the tab; return the field of checkpoints."""
    with gr.Tabs() as tabs:
        with gr.Tab("New run", id="new"):
            form = RunForm(outputs, checkpoints)
        with gr.Tab("Runs", id="runs"):
            view = RunView(outputs)

    def start(values: FormValues) -> tuple[object, ...]:
        folder, shown = form.start_run(model_holder, values)
        if folder is None:
            return *shown, gr.skip(), gr.skip()
        return *shown, gr.update(selected="runs"), folder.relative_to(outputs).as_posix()

    form.start.click(
        lambda *values: start(FormValues(*values)), form.fields, [*form.shown, tabs, view.selected],
        concurrency_limit=1, **PRIVATE,
    ).then(view.refresh, view.selected, view.shown, **QUIET)  # fmt: skip
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
    """The fields of a new run, its check, and its command.

    Args:
        outputs: the folder of runs.
        checkpoints: the checkpoints to choose from.
    """

    def __init__(self, outputs: Path, checkpoints: list[str]):
        self.outputs = outputs
        self.folder = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self._build_part_fields()
            with gr.Column(scale=1, min_width=300):
                self._build_setting_fields(checkpoints)
        self.message = gr.HTML("", elem_id="train-message", elem_classes="vlm-line")
        self.command = gr.Code(
            label="The command", language="shell", interactive=False, visible=False, lines=3, wrap_lines=True,
            elem_id="train-command", show_line_numbers=False,
        )  # fmt: skip
        settings = [self.path, self.images, self.checkpoint, self.lines, self.processes]
        self.fields = [self.run, *self.parts, *settings, self.folder]
        self.shown = [self.message, self.command, self.folder]
        self.check.click(lambda *values: self._check(FormValues(*values)), self.fields, self.shown, **PRIVATE)
        self.run.change(lambda run: note_html(read_run_description(run)), self.run, self.run_description, **QUIET)

    def _build_part_fields(self) -> None:
        self.run = gr.Dropdown(run_names(), value=DEFAULT_RUN, label="Run", elem_id="train-run")
        self.run_description = gr.HTML(note_html(read_run_description(DEFAULT_RUN)), elem_id="train-about")
        self.parts = [
            gr.Dropdown(
                [("as the run has it", ""), *choices(part)], value="", label=part, elem_id=f"train-{part}",
                allow_custom_value=part in HF_NAME_KEYS,
                info="Or a folder, or a name on the Hub" if part in HF_NAME_KEYS else None,
            )
            for part in PARTS
        ]  # fmt: skip

    def _build_setting_fields(self, checkpoints: list[str]) -> None:
        self.path = gr.Textbox(label="dataset.path", placeholder="records.json", elem_id="train-path")
        self.images = gr.Textbox(
            label="dataset.image_folder", info="Beside the records where empty", elem_id="train-images"
        )
        self.checkpoint = gr.Dropdown(
            checkpoints, value=None, allow_custom_value=True, label="trainer.from_pretrained",
            info="Start from this checkpoint; empty: from the parts", elem_id="train-checkpoint",
        )  # fmt: skip
        self.lines = gr.Textbox(
            label="Overrides, one a line", lines=5, max_lines=20, placeholder="trainer.num_train_epochs=1",
            elem_id="train-lines",
        )  # fmt: skip
        self.processes = gr.Number(
            1, label="Processes", info="One for each GPU", precision=0, minimum=1, elem_id="train-processes"
        )
        with gr.Row():
            self.check = gr.Button("Check", elem_id="train-check", min_width=100)
            self.start = gr.Button("Start", variant="primary", elem_id="train-start", min_width=100)

    def _make_command(self, values: FormValues) -> tuple[list[str], Path]:
        """Return the command of the fields and its run directory.

        Raises:
            ValueError: the checks of the command line refuse the fields.
        """
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
        return *_show_command(f"Nothing to fix. It will write into {folder}.", command), str(folder)

    def start_run(self, model_holder: ModelHolder, values: FormValues) -> tuple[Path | None, tuple[object, ...]]:
        """Start a run; return its directory, or None where something has to be fixed, and new values of `shown`."""
        try:
            command, folder = self._make_command(values)
            if active := [run.name for run in find_runs(self.outputs) if run.is_active]:
                raise ValueError(f"{active[0]} is still running; stop it first, or wait for its end")
            model_holder.release()
            jobs.start(command, folder)
        except (ValueError, OSError) as error:
            return None, _show_error(error)
        return folder, (*_show_command(f"Started in {folder}.", command), None)


def _show_error(error: Exception) -> tuple[object, ...]:
    return error_html(str(error)), gr.update(visible=False), None


def _show_command(message: str, command: list[str]) -> tuple[object, object]:
    return note_html(message), gr.update(value=format_for_shell(command), visible=True)


def check_below(folder: Path, outputs: Path) -> None:
    """Raise ValueError where the page would not find a run again."""
    inside = folder.resolve().is_relative_to(outputs.resolve())
    depth = len(folder.resolve().relative_to(outputs.resolve()).parts) if inside else 0
    if not (folder.is_relative_to(outputs) and depth in (1, 2)):
        raise ValueError(
            f"trainer.output_dir={folder}: the page finds runs in {outputs}/NAME and {outputs}/FOLDER/NAME only; "
            "choose such a folder, or start the page with another --outputs"
        )
