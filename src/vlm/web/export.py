"""The tab *Export*: a checkpoint in a format that other programs load, or an adapter merged into its base."""

from pathlib import Path

import gradio as gr

from vlm.config.choices import EXPORT_DTYPES
from vlm.web.commands import EXPORT_DESCRIPTIONS, MERGED, Export
from vlm.web.components import QUIET, checkpoint_dropdown, heading
from vlm.web.html import note_html
from vlm.web.task_view import TaskContext, TaskView
from vlm.web.tasks import EXPORT

ABOUT = (
    "The new folder is read back and compared with the checkpoint before the export counts as finished. "
    "The log lists every difference."
)


def build(outputs: Path, context: TaskContext, names: list[str]) -> gr.Dropdown:
    """Build the tab; return the field of checkpoints."""
    heading("Export", "Write a checkpoint in a format that other programs load, or merge an adapter into its base.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            checkpoint = checkpoint_dropdown(names, "Checkpoint", "finished run", outputs, "export-checkpoint")
            formats = [(f"{name}: {reader}", name) for name, reader in EXPORT_DESCRIPTIONS.items()]
            form = gr.Dropdown(formats, value="llava", label="Format", elem_id="export-format")
            dtype = gr.Dropdown(
                [("as in the checkpoint", ""), *EXPORT_DTYPES],
                value="",
                label="Precision of matrices",
                elem_id="export-dtype",
                visible=False,
            )
            tower = gr.Textbox(
                label="Name of the visual encoder",
                info="Leave empty to use the name recorded in the checkpoint",
                elem_id="export-tower",
                visible=False,
            )
            name = gr.Textbox(
                label=f"New folder in {outputs}/",
                placeholder="RUN-FORMAT",
                elem_id="export-name",
                info="Leave empty to name it after the run and the format",
            )
            with gr.Row():
                check = gr.Button("Check", elem_id="export-check", min_width=100)
                start = gr.Button("Export", variant="primary", elem_id="export-start", min_width=100)
        with gr.Column(scale=3, min_width=300):
            gr.HTML(note_html(ABOUT))
            view = TaskView(EXPORT, outputs)

    def show_options(name: str) -> tuple[object, object]:
        """Show the fields of a format."""
        return gr.update(visible=name == "gguf"), gr.update(visible=name == "llava-original")

    form.change(show_options, form, [dtype, tower], **QUIET)
    view.connect_events(context, start, check, [checkpoint, form, name, dtype, tower], Export, _examine)
    return checkpoint


def _examine(checkpoint: object, form: object) -> None:
    """Refuse a checkpoint that does not fit a format; merging says itself what is no adapter."""
    from vlm.hub.export_check import check_export  # imports torch

    if form != MERGED:
        check_export(str(checkpoint), str(form))
