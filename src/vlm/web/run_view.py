"""The list of runs, and one of them: progress, loss, log, sample answers, configuration; and how it is stopped."""

from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from vlm.web import jobs
from vlm.web.html import error_html, log_html, note_html, run_table_html, samples, status
from vlm.web.runs import Run, find_run, find_runs, last_samples, log_tail, loss_rows, read_metrics, read_run_file

ROW_SELECT_JS = """
element.addEventListener('click', event => {
  const row = event.target.closest('[data-run]');
  if (row) trigger('select', {index: 0, value: row.dataset.run});
})"""
"""What tells the server which row of the table was clicked."""

REFRESH_SECONDS = 2.0
"""Between two looks at a run that is going."""


class RunView:
    """The runs below a folder, and the one that is looked at.

    Args:
        outputs: the folder of runs.
    """

    def __init__(self, outputs: Path):
        self.outputs = outputs
        self.selected = gr.State(None)
        self.last_signature = gr.State(None)
        self.table = gr.HTML(elem_id="runs-table", js_on_load=ROW_SELECT_JS, max_height=300, apply_default_css=False)
        self.refresh_button = gr.Button("Look again", size="sm", elem_id="runs-again")
        self.status = gr.HTML(elem_id="run-status", elem_classes="vlm-line")
        with gr.Row(visible=False) as self.ending:
            self.stop = gr.Button("Stop", variant="stop", elem_id="run-stop")
            self.kill = gr.Button("Kill: nothing is saved", variant="stop", visible=False, elem_id="run-kill")
        self.message = gr.HTML(elem_id="run-message", elem_classes="vlm-line")
        with gr.Column(visible=False) as self.details:
            self.plot = gr.LinePlot(
                x="step", y="loss", color="of", height=260, show_label=False, elem_id="run-plot", buttons=[],
                x_title="step", y_title="loss", color_title=" ",
            )  # fmt: skip
            with gr.Tabs():
                with gr.Tab("Log"):
                    self.log = gr.HTML(elem_id="run-log")
                with gr.Tab("Samples"):
                    self.samples = gr.HTML(elem_id="run-samples")
                with gr.Tab("Configuration"):
                    self.config = gr.Code(
                        language="yaml", interactive=False, wrap_lines=True, max_lines=30, show_label=False,
                        elem_id="run-config",
                    )  # fmt: skip
        self.shown = [
            self.selected, self.last_signature, self.table, self.status, self.ending, self.kill, self.details,
            self.plot, self.log, self.samples, self.config,
        ]  # fmt: skip

    def connect_events(self, page: gr.Blocks) -> None:
        """Connect what is pressed and what time brings."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(self._on_load, None, self.shown, **quiet)
        self.refresh_button.click(self.refresh, self.selected, self.shown, **quiet)
        self.table.select(self._on_select, None, [*self.shown, self.message], **quiet)
        gr.Timer(REFRESH_SECONDS).tick(self._poll, [self.selected, self.last_signature], self.shown, **quiet)
        self.stop.click(lambda name: self._end_run(name, jobs.stop), self.selected, self.message, **quiet).then(
            self.refresh, self.selected, self.shown, **quiet
        )
        self.kill.click(lambda name: self._end_run(name, jobs.kill), self.selected, self.message, **quiet).then(
            self.refresh, self.selected, self.shown, **quiet
        )

    def refresh(self, name: str | None) -> tuple[Any, ...]:
        """Everything anew, in the order of `shown`."""
        runs = find_runs(self.outputs)
        run = find_run(self.outputs, name)
        table = run_table_html(runs, name) if runs else note_html(f"No run found under {self.outputs}/ yet.")
        return run.name if run else None, _get_signature(run), table, *_render_details(run)

    def _on_load(self) -> tuple[Any, ...]:
        """A run that is going is found again by whoever opens the page."""
        return self.refresh(next((run.name for run in find_runs(self.outputs) if run.is_active), None))

    def _on_select(self, event: gr.SelectData) -> tuple[Any, ...]:
        return *self.refresh(str(event.value)), ""

    def _poll(self, name: str | None, last_signature: Any) -> Any:
        """What changed since the last look; nothing where nothing did."""
        run = find_run(self.outputs, name) if name else None
        return (
            [gr.skip()] * len(self.shown)
            if run is None or _get_signature(run) == last_signature
            else self.refresh(name)
        )

    def _end_run(self, name: str | None, end: Any) -> str:
        run = find_run(self.outputs, name)
        if run is None:
            return error_html("choose a run first")
        try:
            end(run.folder)
        except (ValueError, OSError) as error:
            return error_html(str(error))
        if end is jobs.stop:
            return note_html(f"Asked {run.name} and all its processes to end.")
        return note_html(f"Killed {run.name}: what it had not saved is gone.")


def _render_details(run: Run | None) -> tuple[Any, ...]:
    """What is shown of one run, from `status` on."""
    if run is None:
        off = gr.update(visible=False)
        return "", off, off, off, None, "", "", ""
    rows = loss_rows(read_metrics(run.folder))
    job = jobs.read_job(run.folder)
    unknown = "This run was not started from the page: its log is where it was started."
    log = log_tail(run.folder / jobs.LOG_FILE) or (unknown if job is None else "Nothing printed yet.")
    config = "\n".join(f"# {line}" for line in read_run_file(run.folder, "command.txt").splitlines())
    return (
        status(run) + _resume_advice(run), gr.update(visible=run.is_active),
        gr.update(visible=run.is_active and jobs.can_kill(job)), gr.update(visible=True),
        pd.DataFrame(rows, columns=["step", "loss", "of"]) if rows else None, log_html(log),
        samples(*last_samples(run.folder)), f"{config}\n{read_run_file(run.folder, 'config.yaml')}",
    )  # fmt: skip


def _resume_advice(run: Run) -> str:
    """What can be done about a run that did not come to its end."""
    if run.state == "ending":
        return note_html("Asked to end; it is still busy.")
    if run.state not in ("stopped", "failed", "not finished"):
        return ""
    saved = [file.parent for file in run.folder.glob("checkpoint-*/complete")]
    if not saved:
        return note_html("It saved no checkpoint." + (" The log says why it ended." if run.state == "failed" else ""))
    newest = max(saved, key=lambda folder: int(folder.name.rpartition("-")[2]))
    return note_html(f"Saved up to {newest.name}. To go on: trainer.output_dir={run.folder} and "
                "trainer.resume_from_checkpoint=true among the overrides.")  # fmt: skip


def _get_signature(run: Run | None) -> Any:
    """What changes when there is something new to see of a run."""
    if run is None:
        return None
    files = ("metrics.jsonl", jobs.LOG_FILE, "samples.md", "config.yaml")
    sizes = [(run.folder / name).stat().st_size if (run.folder / name).is_file() else 0 for name in files]
    return [run.state, jobs.can_kill(jobs.read_job(run.folder)), *sizes]
