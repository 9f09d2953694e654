"""The list of runs, and one run: its progress, loss, log, sample answers and configuration, and buttons to stop it."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gradio as gr
from gradio.blocks import Block

from vlm.config.secrets import mask
from vlm.config.shown import printable
from vlm.runs.charts import draw_figure
from vlm.runs.read import UNFINISHED
from vlm.runs.status_line import FAILED, STOPPED
from vlm.web import jobs
from vlm.web.components import QUIET
from vlm.web.html import error_html, log_html, note_html, run_table_html, samples_html, status_html
from vlm.web.runs import (
    Run,
    find_run,
    find_runs,
    last_samples,
    log_tail,
    loss_curves,
    read_metrics,
    read_run_file,
    saved_steps,
)

ROW_SELECT_JS = """
element.addEventListener('click', event => {
  const row = event.target.closest('[data-run]');
  if (row) trigger('select', {index: 0, value: row.dataset.run});
})"""
"""Tells the server which row of the table was clicked."""

RUN_LOG = "run.log"
"""The log that a run writes itself, wherever it was started."""

REFRESH_SECONDS = 2.0
"""Seconds between two looks at a run that is active."""


class RunView:
    """The runs below the folder `outputs`, and the selected one; `shown` are the components that `refresh` updates."""

    def __init__(self, outputs: Path):
        self.outputs = outputs
        self.selected = gr.State(None)
        self.last_signature = gr.State(None)
        self.table = gr.HTML(elem_id="runs-table", js_on_load=ROW_SELECT_JS, max_height=300, apply_default_css=False)
        self.refresh_button = gr.Button("Refresh", size="sm", elem_id="runs-again")
        self.status = gr.HTML(elem_id="run-status", elem_classes="vlm-line")
        with gr.Row(visible=False) as self.end_buttons:
            self.stop = gr.Button("Stop", variant="stop", elem_id="run-stop")
            self.kill = gr.Button("Kill without saving", variant="stop", visible=False, elem_id="run-kill")
        self.message = gr.HTML(elem_id="run-message", elem_classes="vlm-line")
        with gr.Column(visible=False) as self.details:
            self.plot = gr.HTML(elem_id="run-plot", elem_classes="vlm-charts")
            with gr.Tabs():
                with gr.Tab("Log"):
                    self.log = gr.HTML(elem_id="run-log")
                with gr.Tab("Samples"):
                    self.samples = gr.HTML(elem_id="run-samples")
                with gr.Tab("Configuration"):
                    self.config = gr.Code(
                        language="yaml",
                        interactive=False,
                        wrap_lines=True,
                        max_lines=30,
                        show_label=False,
                        elem_id="run-config",
                    )
        details: list[Block] = [self.kill, self.details, self.plot, self.log, self.samples, self.config]
        self.shown = [self.selected, self.last_signature, self.table, self.status, self.end_buttons, *details]

    def connect_events(self, page: gr.Blocks) -> None:
        """Connect the buttons, the table and the timer."""
        page.load(self._on_load, None, self.shown, **QUIET)
        self.refresh_button.click(self.refresh, self.selected, self.shown, **QUIET)
        self.table.select(self._on_select, None, [*self.shown, self.message], **QUIET)
        gr.Timer(REFRESH_SECONDS).tick(self._poll, [self.selected, self.last_signature], self.shown, **QUIET)
        for button, end, message in (
            (self.stop, jobs.stop, "Stopping {} and all its processes."),
            (self.kill, jobs.kill, "Killed {}. Whatever it had not saved is lost."),
        ):
            button.click(partial(self._end_run, end, message), self.selected, self.message, **QUIET).then(
                self.refresh, self.selected, self.shown, **QUIET
            )

    def refresh(self, name: str | None) -> tuple[object, ...]:
        """Return new values of all components of `shown`, for the run of a name."""
        runs = find_runs(self.outputs)
        run = find_run(self.outputs, name)
        table = run_table_html(runs, name) if runs else note_html(f"There are no runs in {self.outputs}/ yet.")
        return run.name if run else None, _get_signature(run), table, *_render_details(run)

    def _on_load(self) -> tuple[object, ...]:
        """Show the run that is active, if there is one."""
        return self.refresh(next((run.name for run in find_runs(self.outputs) if run.is_active), None))

    def _on_select(self, event: gr.SelectData) -> tuple[object, ...]:
        return *self.refresh(str(event.value)), ""

    def _poll(self, name: str | None, last_signature: list[object] | None) -> tuple[object, ...]:
        """Refresh the selected run if it changed."""
        run = find_run(self.outputs, name) if name else None
        if run is None or _get_signature(run) == last_signature:
            return (gr.skip(),) * len(self.shown)
        return self.refresh(name)

    def _end_run(self, end: Callable[[Path], object], message: str, name: str | None) -> str:
        run = find_run(self.outputs, name)
        if run is None:
            return error_html("Choose a run first.")
        try:
            end(run.folder)
        except (ValueError, OSError) as error:
            return error_html(str(error))
        return note_html(message.format(run.name))


def _render_details(run: Run | None) -> tuple[object, ...]:
    """Return the values of `RunView.shown` from `status` on."""
    if run is None:
        hidden = gr.update(visible=False)
        return "", hidden, hidden, hidden, "", "", "", ""
    log = log_tail(run.folder / jobs.LOG_FILE) or log_tail(run.folder / RUN_LOG)
    job = jobs.read_job(run.folder)
    no_log = "This run was not started from this page. Its log is where it was started."
    command = "\n".join(f"# {line}" for line in read_run_file(run.folder, "command.txt").splitlines())
    return (
        status_html(run) + _resume_advice(run),
        gr.update(visible=run.is_active),
        gr.update(visible=run.is_active and jobs.can_kill(job)),
        gr.update(visible=True),
        draw_figure("Loss", loss_curves(read_metrics(run.folder)), log_scale=not run.is_active),
        log_html(mask(log) or ("Nothing has been printed yet." if job else no_log)),
        samples_html(*last_samples(run.folder)),
        printable(mask(f"{command}\n{read_run_file(run.folder, 'config.yaml')}")),  # of earlier versions, unmasked
    )


def _resume_advice(run: Run) -> str:
    """Return how to resume a run that did not finish."""
    if run.state == "ending":
        return note_html("Stopping. It finishes its step and saves a checkpoint first.")
    if run.state not in (STOPPED, FAILED, UNFINISHED):
        return ""
    same = "run the same command, or fill in the same fields here"
    again = f"{same} and add trainer.output_dir={run.folder} to the overrides"
    steps = saved_steps(run.folder)
    if not steps:
        why = " The log says why it ended." if run.state == FAILED else ""
        return note_html(f"It saved no checkpoint.{why} To start over, {again}.")
    return note_html(f"The last checkpoint is checkpoint-{max(steps)}. To resume, {again}.")


def _get_signature(run: Run | None) -> list[object] | None:
    """Return values that change when the view of a run has to change."""
    if run is None:
        return None
    files = [
        run.folder / name
        for name in ("metrics.jsonl", jobs.LOG_FILE, RUN_LOG, "samples.md", "config.yaml", "status.json")
    ]
    sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
    now = int(time.time() / REFRESH_SECONDS) if run.is_active else None  # the time it has taken moves on
    return [run.state, jobs.can_kill(jobs.read_job(run.folder)), now, *sizes]
