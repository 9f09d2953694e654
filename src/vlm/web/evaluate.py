"""The tab *Evaluate*: metrics of a checkpoint on records, with intervals, and the worst answers."""

from pathlib import Path

import gradio as gr

from vlm.config.schema import InferenceConfig
from vlm.web.commands import METRICS, RECORD_FORMATS, Evaluation
from vlm.web.components import QUIET, checkpoint_dropdown, heading
from vlm.web.html import note_html
from vlm.web.result_html import results_html, worst_html
from vlm.web.results import find_results, read_results, worst_answers
from vlm.web.task_view import TaskContext, TaskView
from vlm.web.tasks import EVALUATION, StartedTask

EMPTY_TEXT = "Results appear here: each metric with its 95% interval, and the answers furthest from their references."
DEFAULT_METRICS = ["exact_match", "loss"]


def build(outputs: Path, context: TaskContext, names: list[str]) -> gr.Dropdown:
    """Build the tab; return the field of checkpoints."""
    heading("Evaluate", "Measure a checkpoint on your own records, and see where it goes wrong.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            checkpoint = checkpoint_dropdown(names, "Checkpoint", "finished run", outputs, "evaluate-checkpoint")
            data = gr.Textbox(label="Records", placeholder="val.json", elem_id="evaluate-data")
            beside = "Leave empty if the images are next to the records"
            images = gr.Textbox(label="Image folder", info=beside, elem_id="evaluate-images")
            metrics = gr.Dropdown(
                list(METRICS), value=DEFAULT_METRICS, multiselect=True, label="Metrics", elem_id="evaluate-metrics"
            )
            with gr.Accordion("More", open=False, elem_id="evaluate-more"):
                formats = [("detect from the file name", ""), *RECORD_FORMATS]
                form = gr.Dropdown(formats, value="", label="Format of the records", elem_id="evaluate-format")
                with gr.Row():
                    longest = gr.Number(
                        InferenceConfig.max_new_tokens, label="Longest answer", info="in tokens", precision=0,
                        minimum=1, elem_id="evaluate-longest", min_width=120,
                    )  # fmt: skip
                    batch = gr.Number(
                        16, label="Batch size", info="in records", precision=0, minimum=1, elem_id="evaluate-batch",
                        min_width=120,
                    )  # fmt: skip
            with gr.Row():
                check = gr.Button("Check", elem_id="evaluate-check", min_width=100)
                start = gr.Button("Evaluate", variant="primary", elem_id="evaluate-start", min_width=100)
        with gr.Column(scale=3, min_width=300):
            task_column = gr.Column()
            chosen = gr.Dropdown(
                label="Results",
                info=f"Evaluations in {outputs}/, the newest first",
                elem_id="evaluate-chosen",
                visible=False,
            )
            shown = gr.HTML(note_html(EMPTY_TEXT), elem_id="evaluate-results")

    def show_ended(task: StartedTask) -> tuple[object, ...]:
        """Offer the results of a task that has ended, and show them."""
        found = find_results(outputs)
        if task.state != "finished":
            return gr.update(choices=found, visible=bool(found)), gr.skip()
        name = Path(task.task.result).resolve().relative_to(outputs.resolve()).as_posix()
        return gr.update(choices=found, value=name, visible=True), _show(outputs, name)

    def show_newest() -> tuple[object, object]:
        """Offer the results that there are now, and show the newest."""
        found = find_results(outputs)
        newest = next(iter(found), None)
        return gr.update(choices=found, value=newest, visible=bool(found)), _show(outputs, newest)

    context.page.load(show_newest, None, [chosen, shown], **QUIET)
    with task_column:
        view = TaskView(EVALUATION, outputs, show_ended, [chosen, shown])
    chosen.input(lambda name: _show(outputs, name), chosen, shown, **QUIET)
    fields = [checkpoint, data, images, metrics, form, longest, batch]
    view.connect_events(context, start, check, fields, Evaluation)
    return checkpoint


def _show(outputs: Path, name: str | None) -> str:
    """Return the results of a name as HTML."""
    evaluation = read_results(outputs, name)
    if evaluation is None:
        return note_html(EMPTY_TEXT)
    return results_html(evaluation) + worst_html(worst_answers(evaluation.folder))
