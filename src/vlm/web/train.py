"""The tab *Train*: a new run from fields and overrides, and the runs that there are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from vlm.config.packaged import read_run_description, run_names
from vlm.web import jobs
from vlm.web.html import error_html, note_html
from vlm.web.models import ModelHolder
from vlm.web.plan import PARTS, Plan, choices, choose_run_folder, format_for_shell, make_command
from vlm.web.run_view import RunView
from vlm.web.runs import checkpoints, find_runs

DEFAULT_RUN = "pretrain-smol"
"""The run that is chosen at first."""


def build(outputs: Path, model_holder: ModelHolder, page: gr.Blocks) -> gr.Dropdown:
    """Lay the tab out; returns the choice of checkpoints."""
    with gr.Tabs() as tabs:
        with gr.Tab("New run", id="new"):
            form = RunForm(outputs)
        with gr.Tab("Runs", id="runs"):
            view = RunView(outputs)

    def start(*values: Any) -> tuple[Any, ...]:
        folder, shown = form.start_run(model_holder, *values)
        if folder is None:
            return *shown, gr.skip(), gr.skip()
        return *shown, gr.update(selected="runs"), folder.relative_to(outputs).as_posix()

    form.start.click(
        start, form.fields, [*form.shown, tabs, view.selected], api_visibility="private", concurrency_limit=1
    ).then(view.refresh, view.selected, view.shown, api_visibility="private", show_progress="hidden")
    view.connect_events(page)
    return form.checkpoint


class RunForm:
    """The fields of a new run, its check, and its command.

    Args:
        outputs: the folder of runs.
    """

    def __init__(self, outputs: Path):
        self.outputs = outputs
        self.folder = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self._build_part_fields()
            with gr.Column(scale=1, min_width=300):
                self._build_setting_fields()
        self.message = gr.HTML("", elem_id="train-message", elem_classes="vlm-line")
        self.command = gr.Code(
            label="The command", language="shell", interactive=False, visible=False, lines=3, wrap_lines=True,
            elem_id="train-command", show_line_numbers=False,
        )  # fmt: skip
        parts = [self.parts[part] for part in PARTS]
        self.fields = [
            self.run, *parts, self.path, self.images, self.checkpoint, self.lines, self.processes, self.folder,
        ]  # fmt: skip
        self.shown = [self.message, self.command, self.folder]
        self.check.click(self._check, self.fields, self.shown, api_visibility="private")
        self.run.change(
            lambda run: note_html(read_run_description(run)),
            self.run,
            self.run_description,
            api_visibility="private",
            show_progress="hidden",
        )

    def _build_part_fields(self) -> None:
        self.run = gr.Dropdown(run_names(), value=DEFAULT_RUN, label="Run", elem_id="train-run")
        self.run_description = gr.HTML(note_html(read_run_description(DEFAULT_RUN)), elem_id="train-about")
        self.parts = {}
        for part in PARTS:
            free = part in ("visual_encoder", "language_model")
            self.parts[part] = gr.Dropdown(
                [("as the run has it", ""), *choices(part)], value="", label=part, allow_custom_value=free,
                info="Or a folder, or a name on the Hub" if free else None, elem_id=f"train-{part}",
            )  # fmt: skip

    def _build_setting_fields(self) -> None:
        self.path = gr.Textbox(label="dataset.path", placeholder="records.json", elem_id="train-path")
        self.images = gr.Textbox(
            label="dataset.image_folder", info="Beside the records where empty", elem_id="train-images"
        )
        self.checkpoint = gr.Dropdown(
            checkpoints(self.outputs), value=None, allow_custom_value=True, label="trainer.from_pretrained",
            info="Go on from this checkpoint; empty: from the parts", elem_id="train-checkpoint",
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

    def _make_command(self, values: Sequence[Any]) -> tuple[list[str], Path]:
        """The command of the fields and its run directory.

        Raises:
            ValueError: what the checks of the command line refuse.
        """
        run, *rest = values
        parts, (path, images, checkpoint, lines, processes, before) = rest[: len(PARTS)], rest[len(PARTS) :]
        keys = {
            "dataset.path": path, "dataset.image_folder": images, "trainer.from_pretrained": checkpoint,
        }  # fmt: skip
        plan = Plan(run, dict(zip(PARTS, parts, strict=True)), keys, lines)
        named = plan.compose_config().trainer.output_dir
        folder = choose_run_folder(run, self.outputs, before) if named is None else Path(named)
        check_below(folder, self.outputs)
        return make_command(plan, folder if named is None else None, int(processes or 0)), folder

    def _check(self, *values: Any) -> tuple[Any, ...]:
        try:
            command, folder = self._make_command(values)
        except (ValueError, OSError) as error:
            return error_html(str(error)), gr.update(visible=False), None
        said = note_html(f"Nothing to mend. It will write into {folder}.")
        return said, gr.update(value=format_for_shell(command), visible=True), str(folder)

    def start_run(self, model_holder: ModelHolder, *values: Any) -> tuple[Path | None, tuple[Any, ...]]:
        """Start a run; returns its directory, none where something has to be mended, and what the form then shows."""
        try:
            command, folder = self._make_command(values)
            if going := [run.name for run in find_runs(self.outputs) if run.is_active]:
                raise ValueError(f"{going[0]} is still running; stop it first, or wait for its end")
            model_holder.release()
            jobs.start(command, folder)
        except (ValueError, OSError) as error:
            return None, (error_html(str(error)), gr.update(visible=False), None)
        return folder, (
            note_html(f"Started in {folder}."),
            gr.update(value=format_for_shell(command), visible=True),
            None,
        )


def check_below(folder: Path, outputs: Path) -> None:
    """Raise ValueError where the page would not find a run again."""
    inside = folder.resolve().is_relative_to(outputs.resolve())
    depth = len(folder.resolve().relative_to(outputs.resolve()).parts) if inside else 0
    if not (folder.is_relative_to(outputs) and depth in (1, 2)):
        raise ValueError(
            f"trainer.output_dir={folder}: the page finds runs in {outputs}/NAME and {outputs}/FOLDER/NAME only; "
            "choose such a folder, or start the page with another --outputs"
        )
