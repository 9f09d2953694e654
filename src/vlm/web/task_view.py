"""The newest task of a kind: its state, how long it has been running, its log, and a button to stop it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from vlm.config.secrets import mask
from vlm.web import jobs
from vlm.web.commands import Evaluation, Export, Place, format_command
from vlm.web.components import PRIVATE, QUIET
from vlm.web.html import error_html, log_html, note_html, task_html
from vlm.web.models import ModelHolder
from vlm.web.tasks import StartedTask, find_tasks, start_task

REFRESH_SECONDS = 1.0
"""Seconds between two looks at a task that is active."""


@dataclass(frozen=True)
class TaskContext:
    """What starting a task takes: the page, where it may write, and the model to release first."""

    page: gr.Blocks
    place: Place
    holder: ModelHolder


class TaskView:
    """The components of a tab that show its newest task.

    Args:
        kind: the kind of the tab's tasks.
        outputs: the folder that tasks are in.
        on_end: returns new values of `outputs_at_end`, for the task that has ended.
        outputs_at_end: components that change when a task has ended.
    """

    def __init__(
        self,
        kind: str,
        outputs: Path,
        on_end: Callable[[StartedTask], tuple[object, ...]] | None = None,
        outputs_at_end: Sequence[gr.components.Component] = (),
    ):
        self.kind, self.outputs, self.on_end, self.outputs_at_end = kind, outputs, on_end, list(outputs_at_end)
        self.known_state = gr.State(None)
        self.message = gr.HTML("", elem_id=f"{kind}-message", elem_classes="vlm-line")
        self.command = gr.Code(
            label="Command",
            language="shell",
            interactive=False,
            visible=False,
            lines=2,
            wrap_lines=True,
            elem_id=f"{kind}-command",
            show_line_numbers=False,
        )
        self.status = gr.HTML("", elem_id=f"{kind}-status", elem_classes="vlm-line")
        self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id=f"{kind}-stop")
        with gr.Accordion("Log", open=False, visible=False, elem_id=f"{kind}-log-section") as self.log_section:
            self.log = gr.HTML("", elem_id=f"{kind}-log")
        self.shown = [self.known_state, self.status, self.stop, self.log_section, self.log, *self.outputs_at_end]

    def connect_events(
        self,
        context: TaskContext,
        start: gr.Button,
        check: gr.Button,
        fields: Sequence[gr.components.Component],
        make: Callable[..., Evaluation | Export],
        examine: Callable[[object, object], None] | None = None,
    ) -> None:
        """Connect the buttons and the timer.

        `make` takes the values of the fields. `examine` takes the first two of them when a command is only checked,
        and raises ValueError where it would be refused.
        """

        def show_command(*values: object) -> tuple[object, object]:
            """Return a message and the command of the fields."""
            try:
                task, command = make(*values).make(context.place)
                if examine is not None:
                    examine(*values[:2])
            except (ValueError, OSError) as error:
                return error_html(str(error)), gr.update(visible=False)
            return note_html(f"Ready to start. It will write to {task.result}."), _shown_command(command)

        def begin(*values: object) -> tuple[object, object, object]:
            """Start the task of the fields; the state that is known of it is that it runs."""
            try:
                task, command = make(*values).make(context.place)
                context.holder.release()
                started = start_task(self.outputs, task, command)
            except (ValueError, OSError) as error:
                return error_html(str(error)), gr.update(visible=False), gr.skip()
            return "", _shown_command(command), [started.folder.name, "running"]

        told = [self.message, self.command]
        check.click(show_command, list(fields), told, **PRIVATE)
        start.click(begin, list(fields), [*told, self.known_state], concurrency_limit=1, **PRIVATE).then(
            self._refresh, self.known_state, self.shown, **QUIET
        )
        self.stop.click(self._stop, None, self.message, **QUIET)
        context.page.load(self._refresh, self.known_state, self.shown, **QUIET)
        gr.Timer(REFRESH_SECONDS).tick(self._poll, self.known_state, self.shown, **QUIET)

    def _newest(self) -> StartedTask | None:
        return next(iter(find_tasks(self.outputs, self.kind)), None)

    def _poll(self, known: list[str] | None) -> tuple[object, ...]:
        """Refresh the view where a task is active, or has ended since the last look."""
        task = self._newest()
        if task is None or (known == [task.folder.name, task.state] and not task.is_active):
            return (gr.skip(),) * len(self.shown)
        return self._refresh(known)

    def _refresh(self, known: list[str] | None) -> tuple[object, ...]:
        """Return new values of `shown`."""
        task = self._newest()
        if task is None:
            return (gr.skip(),) * len(self.shown)
        now = [task.folder.name, task.state]
        ended = known is not None and known != now and not task.is_active and self.on_end is not None
        at_end = self.on_end(task) if ended and self.on_end else (gr.skip(),) * len(self.outputs_at_end)
        log = mask(task.log)
        is_news = task.state == "failed" and known != now
        section = gr.update(visible=bool(log), open=True) if is_news else gr.update(visible=bool(log))
        stop = gr.update(visible=task.is_active)
        return now, task_html(task), stop, section, log_html(log), *at_end

    def _stop(self) -> str:
        task = self._newest()
        if task is None:
            return ""
        try:
            jobs.stop(task.folder)
        except (ValueError, OSError) as error:
            return error_html(str(error))
        return note_html("Stopping.")


def _shown_command(command: Sequence[str]) -> object:
    return gr.update(value=format_command(command), visible=True)
