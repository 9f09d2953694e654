"""`report.html` of a run directory: everything known about a run, in one file that needs no network.

Each function of `report_parts` and `report_outcomes` makes one section, or nothing if the run has nothing to say. A
run may come from someone else: texts are escaped and bounded, images are re-encoded, and damaged files are named at the
top.
"""

import logging
from pathlib import Path

from vlm.config.html_page import html_page
from vlm.runs.html import STYLE, ImageBudget, anchor, section, text
from vlm.runs.listing import format_duration, format_number
from vlm.runs.read import REPORT_FILE, RunDirectory
from vlm.runs.report_outcomes import evaluation, heads, samples, skipped_records
from vlm.runs.report_parts import curves, data, model, repeat, resumes, speed, versions, warnings

log = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 8 << 20
"""The maximum size of all embedded images of a page, in bytes."""


def make_report(run: RunDirectory) -> str:
    """Return the page of a run."""
    images = ImageBudget(MAX_IMAGE_BYTES)
    bodies = {
        "Model": model(run),
        "Data": data(run),
        "Curves": curves(run),
        "Evaluation": evaluation(run, images),
        "Heads": heads(run, images),
        "Samples": samples(run, images),
        "Left-out records": skipped_records(run),
        "Speed": speed(run),
        "Changes at resume": resumes(run),
        "Versions": versions(run),
        "How to repeat it": repeat(run),
    }
    links = "".join(f'<a href="#{anchor(title)}">{text(title)}</a>' for title, body in bodies.items() if body)
    body = f'<p class="meta">{_subtitle(run)}</p>{_tiles(run)}{warnings(run, images)}<nav>{links}</nav>' + "".join(
        section(title, body) for title, body in bodies.items()
    )
    return html_page(f"Run {run.name}", body, style=STYLE)


def _subtitle(run: RunDirectory) -> str:
    from datetime import datetime

    when = f"{datetime.fromtimestamp(run.started):%Y-%m-%d %H:%M}" if run.started is not None else ""
    words = [text(word) for word in (run.recipe, when) if word]
    return " · ".join([f'<span class="state {run.state.split()[0]}">{text(run.state)}</span>', *words])


def _tiles(run: RunDirectory) -> str:
    last = run.metrics.last
    epochs = last("epoch")
    facts = {
        "steps": f"{run.step:,}" + (f" of {run.max_steps:,}" if run.max_steps and run.max_steps != run.step else ""),
        "epochs": "" if epochs is None else f"{epochs:.3g}",
        "training loss": _number(last("loss")),
        "evaluation loss": _number(last("eval_loss"), run.metrics.last_half_width("eval_loss")),
        "tokens/s": _number(run.tokens_per_second),
        "duration": "" if run.seconds is None else format_duration(run.seconds),
        "peak memory": "" if (memory := run.peak_memory) is None else f"{format_number(memory)} GiB",
    }
    tiles = "".join(f"<li><b>{text(fact)}</b><span>{name}</span></li>" for name, fact in facts.items() if fact)
    return f'<ul class="tiles">{tiles}</ul>'


def _number(value: float | None, half_width: float | None = None) -> str:
    return "" if value is None else format_number(value) + ("" if half_width is None else f" ± {half_width:.2g}")


def write_report(folder: Path, state: str | None = None) -> Path:
    """Write the page of a run into its directory, and return its path.

    Args:
        folder: the run directory.
        state: how the run ended, if its files do not say so yet.
    """
    run = RunDirectory(folder)
    if state is not None:
        run.state = state
    partial = folder / f"{REPORT_FILE}.partial"
    partial.write_text(make_report(run), encoding="utf-8")
    return partial.replace(folder / REPORT_FILE)


def try_to_write_report(folder: Path, state: str | None = None) -> Path | None:
    """Write the page of a run at its end; errors are logged and do not make the run fail."""
    try:
        return write_report(folder, state)
    except Exception:
        log.warning("%s: %s could not be written", folder, REPORT_FILE, exc_info=True)
        return None
