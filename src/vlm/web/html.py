"""Small pieces of HTML that the page is made of; whatever they are given is escaped. Needs no Gradio."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlm.web.runs import Run


def error_html(text: str) -> str:
    """What has to be mended, as the checks say it."""
    return f'<p class="vlm-problem" role="alert">{escape(text)}</p>'


def note_html(text: str) -> str:
    """A line in passing."""
    return f'<p class="vlm-note">{escape(text)}</p>'


def bars_html(title: str, decided: str, shares: Mapping[Any, float]) -> str:
    """A head's answer: what it decided, and a bar for each label, the likeliest first."""
    rows = "".join(
        f'<div class="vlm-bar"><span>{escape(str(label))}</span>'
        f'<div role="img" aria-label="{share:.1%}"><i style="width:{100 * share:.2f}%"></i></div>'
        f"<b>{share:.1%}</b></div>"
        for label, share in sorted(shares.items(), key=lambda one: -one[1])
    )
    head = f'<h3>{escape(title)}</h3><p class="vlm-decided">{escape(decided)}</p>'
    return f'<section class="vlm-head">{head}{rows}</section>'


def status(run: Run) -> str:
    """A run's state in a line, and how far it is."""
    details = [f"step {run.step:,}" if run.step else "no step logged yet"]
    details += [f"loss {run.loss:.4g}"] if run.loss is not None else []
    details += [f"started {run.started:%Y-%m-%d %H:%M}"]
    share = run.progress or 0.0
    return (
        f'<section class="vlm-run"><h3>{escape(run.name)} {_state_html(run)}</h3>'
        f"<p>{' · '.join(details)}</p>"
        f'<div class="vlm-progress" role="progressbar" aria-label="progress" aria-valuenow="{100 * share:.0f}">'
        f'<i style="width:{100 * share:.1f}%"></i></div><p class="vlm-note">{100 * share:.0f}%</p></section>'
    )


def log_html(text: str) -> str:
    """A log, of which the end is seen."""
    return f'<div class="vlm-log" tabindex="0"><pre>{escape(text)}</pre></div>'


def run_table_html(runs: Sequence[Run], selected: str | None) -> str:
    """The runs, a row each; a row's name is a button, so that keys reach it too."""
    rows = "".join(
        f'<tr data-run="{escape(run.name)}" aria-selected="{str(run.name == selected).lower()}">'
        f"<td><button>{escape(run.name)}</button></td><td>{_state_html(run)}</td>"
        f'<td class="number">{run.step:,}</td><td class="number">{"" if run.loss is None else f"{run.loss:.4g}"}</td>'
        f'<td class="started">{run.started:%Y-%m-%d %H:%M}</td></tr>'
        for run in runs
    )
    names = {"Run": "", "State": "", "Step": "number", "Loss": "number", "Started": "started"}
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in names.items())
    return f'<table class="vlm-runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _state_html(run: Run) -> str:
    return f'<span class="vlm-state vlm-{run.state.replace(" ", "-")}">{run.state}</span>'


def samples(title: str, found: Sequence[Mapping[str, str]]) -> str:
    """Sample answers of a run, with their images."""
    if not found:
        return note_html("No sample answers yet. A run writes them when it evaluates, saves or ends.")
    parts = []
    for one in found:
        image = f'<img src="{_data_url(Path(one["picture"]))}" alt="">' if "picture" in one else ""
        texts = "".join(
            f"<dt>{name}</dt><dd>{escape(one[name])}</dd>"
            for name in ("question", "reference", "answer")
            if name in one
        )
        parts.append(f'<div class="vlm-sample">{image}<dl>{texts}</dl></div>')
    return f"<h3>{escape(title)}</h3>{''.join(parts)}"


def _data_url(image: Path) -> str:
    """An image of a run directory as a `data:` address: no folder has to be served for it."""
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}" if image.is_file() else ""
