"""HTML fragments of the page; all text is escaped. Needs no Gradio."""

import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from vlm.config.shown import presentable, printable
from vlm.runs.files import number_at, text_at
from vlm.runs.html import embed_image
from vlm.runs.listing import format_duration
from vlm.runs.read import RunDirectory
from vlm.web.runs import Run, SampleAnswer
from vlm.web.tasks import StartedTask

THUMBNAIL = 224
"""Pixels of the longer side of a sample's image."""


def text_html(text: str) -> str:
    """Return a text as HTML: escaped, with characters that hide or reorder text written out."""
    return escape(printable(text))


def header_html(outputs: Path) -> str:
    """Return the head of the page: what it is, and which runs on which machine it shows."""
    where = f"runs in {text_html(str(outputs))}/ on {text_html(socket.gethostname())}"
    return f'<header><h1>small-vlm</h1><p class="vlm-note">{where}</p></header>'


def error_html(text: str) -> str:
    """Return a message about what the user has to fix."""
    return f'<p class="vlm-problem" role="alert">{escape(presentable(text))}</p>'


def chat_text(text: str) -> str:
    """Return the content of a message of a `gr.Chatbot` for a text: Gradio takes it for HTML, without Markdown too."""
    return escape(printable(text), quote=False)


def toast_html(text: str) -> str:
    """Return the message of a `gr.Error` for a text: Gradio takes messages for HTML."""
    return escape(presentable(text))


def note_html(text: str) -> str:
    """Return a note."""
    return f'<p class="vlm-note">{text_html(text)}</p>'


def bars_html(title: str, prediction: str, probabilities: Mapping[str, float]) -> str:
    """Return a head's prediction, with a bar for each label, the most probable first."""
    rows = "".join(
        f'<div class="vlm-bar"><span>{text_html(label)}</span>'
        f'<div role="img" aria-label="{share:.1%}"><i style="width:{100 * share:.2f}%"></i></div>'
        f"<b>{share:.1%}</b></div>"
        for label, share in sorted(probabilities.items(), key=lambda item: -item[1])
    )
    head = f'<h3>{text_html(title)}</h3><p class="vlm-decided">{text_html(prediction)}</p>'
    return f'<section class="vlm-head">{head}{rows}</section>'


def status_html(run: Run) -> str:
    """Return a run's state, what it is doing now, and a progress bar."""
    live = text_html(" · ".join(_live_details(RunDirectory(run.folder)))) if run.is_active else ""
    details = [f"step {run.step:,}" if run.step else "no step logged yet"]
    details += [f"loss {run.loss:.4g}"] if run.loss is not None else []
    details += [f"started {run.started:%Y-%m-%d %H:%M}"]
    progress = run.progress
    percent = "" if progress is None else f'<p class="vlm-note">{100 * progress:.0f}%</p>'
    return (
        f'<section class="vlm-run"><h3>{text_html(run.name)} {_state_html(run.state)}</h3>'
        f"<p>{' · '.join(details)}</p>{f'<p>{live}</p>' if live else ''}"
        f"{_progress_html(progress, run.is_active)}{percent}</section>"
    )


def _live_details(run: RunDirectory) -> Iterator[str]:
    """Yield what an active run is doing, how long it has been at it, and what `status.json` says of its speed."""
    state = text_at(run.status, "state")
    yield {"starting": "loading model and data", "": "running"}.get(state, state)
    if run.seconds is not None:
        yield f"for {format_duration(run.seconds)}"
    if (left := number_at(run.status, "seconds_left")) is not None:
        yield f"{format_duration(left)} left"
    if (speed := number_at(run.status, "tokens_per_second")) is not None:
        yield f"{speed:,.0f} tokens/s"
    if (memory := number_at(run.status, "memory_bytes")) is not None:
        yield f"{memory / 2**30:.1f} GiB"
    if (waiting := number_at(run.status, "waiting_share")) is not None:
        yield f"{waiting:.0%} waiting for data"


def task_html(task: StartedTask) -> str:
    """Return the state of a task, how long it has been running, and a progress bar."""
    seconds = task.seconds
    details = [] if seconds is None else [f"running for {format_duration(seconds)}"]
    details += [f"started {datetime.fromtimestamp(task.job.started):%Y-%m-%d %H:%M}"]
    if task.state == "finished":
        details.append(f"written to {text_html(task.task.result)}")
    last = next((line for line in reversed(task.log.splitlines()) if line.strip()), "") if task.is_active else ""
    progress = _progress_html(task.progress, task.is_active)
    return (
        f'<section class="vlm-run"><h3>{text_html(task.task.title)} {_state_html(task.state)}</h3>'
        f"<p>{' · '.join(details)}</p>{progress}{note_html(last) if last else ''}</section>"
    )


def loading_html(text: str) -> str:
    """Return a sign of life of work that cannot tell how far it is."""
    return f'<p class="vlm-note vlm-busy" role="status">{text_html(text)}</p>'


def _progress_html(progress: float | None, is_active: bool) -> str:
    """Return a progress bar; one that moves where the work is active and cannot tell how far it is."""
    if progress is None:
        return '<div class="vlm-progress vlm-moving" role="progressbar" aria-label="working"></div>' * is_active
    percent = 100 * progress
    return (
        f'<div class="vlm-progress" role="progressbar" aria-label="progress" aria-valuenow="{percent:.0f}">'
        f'<i style="width:{percent:.1f}%"></i></div>'
    )


def log_html(text: str) -> str:
    """Return a log, scrolled to its end."""
    return f'<div class="vlm-log" tabindex="0"><pre>{text_html(text)}</pre></div>'


def run_table_html(runs: Sequence[Run], selected: str | None) -> str:
    """Return a table of runs; each row's name is a button, so that the keyboard reaches it too."""
    rows = "".join(
        f'<tr data-run="{text_html(run.name)}" aria-selected="{str(run.name == selected).lower()}">'
        f"<td><button>{text_html(run.name)}</button></td><td>{_state_html(run.state)}</td>"
        f'<td class="number">{run.step:,}</td><td class="number">{"" if run.loss is None else f"{run.loss:.4g}"}</td>'
        f'<td class="started">{run.started:%Y-%m-%d %H:%M}</td></tr>'
        for run in runs
    )
    names = {"Run": "", "State": "", "Step": "number", "Loss": "number", "Started": "started"}
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in names.items())
    return f'<table class="vlm-runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _state_html(state: str) -> str:
    return f'<span class="vlm-state vlm-{state.replace(" ", "-")}">{state}</span>'


def samples_html(title: str, samples: Sequence[SampleAnswer]) -> str:
    """Return sample answers of a run, with their images."""
    if not samples:
        return note_html("No sample answers yet. A run writes them when it evaluates, saves or ends.")
    parts = []
    for sample in samples:
        address = embed_image(Path(sample["image"]), THUMBNAIL) if "image" in sample else ""
        image = f'<img src="{address}" alt="image of the sample">' if address else ""
        texts = [(name, sample.get(name)) for name in ("question", "reference", "answer")]
        rows = "".join(f"<dt>{name}</dt><dd>{text_html(text)}</dd>" for name, text in texts if text is not None)
        parts.append(f'<div class="vlm-sample">{image}<dl>{rows}</dl></div>')
    return f"<h3>{text_html(title)}</h3>{''.join(parts)}"
