"""HTML of a comparison of runs: what differs, how it went, what was measured and what they answered.

All text is escaped. Needs neither torch nor Gradio.
"""

from collections.abc import Iterator, Sequence

from vlm.config.short_names import short_keys, show_value
from vlm.runs.charts import Curve, draw_figure
from vlm.runs.differences import setting_of, varied_settings
from vlm.runs.html import ImageBudget, table, text
from vlm.runs.listing import format_duration, format_number
from vlm.runs.metrics import INTERVAL_SUFFIX
from vlm.runs.outcome import describe_verdict, group_by_setting, metric_of, sign_of
from vlm.runs.read import RunDirectory
from vlm.runs.report_outcomes import OTHER_WEIGHTS, show_score
from vlm.runs.samples import Answer

MAX_SAMPLES = 8
"""Samples that are shown side by side."""
MAX_SETTINGS = 40
"""Settings that are shown where runs differ."""
MAX_IMAGE_BYTES = 4 << 20
"""Bytes of all images of a comparison together."""
THUMBNAIL = 192
"""Pixels of the longer side of an image."""
FIGURES = {"loss": "Training loss", "eval_loss": "Evaluation loss"}
"""Metric -> the title of its figure."""
NOT_MEASURES = ("runtime", "samples_per_second", "steps_per_second")
"""What an evaluation logs besides its metrics."""


def comparison_html(runs: Sequence[RunDirectory]) -> str:
    """Return the comparison of at least two runs."""
    metric = metric_of(runs)
    verdict = describe_verdict(group_by_setting(runs, metric), metric, sign_of(metric, runs))
    figures = "".join(_figure(runs, name, title) for name, title in FIGURES.items())
    parts = {
        "Outcome": f"<p>{text(verdict)}</p>{_table('', runs, list(_outcome_rows(runs)))}",
        "Settings that differ": _settings(runs),
        "Curves": figures,
        "Answers side by side": _samples(runs),
    }
    sections = "".join(f"<section><h3>{title}</h3>{body}</section>" for title, body in parts.items() if body)
    return f'<div class="vlm-charts">{sections}</div>'


def _table(first: str, runs: Sequence[RunDirectory], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with a column for each run."""
    return f'<div class="vlm-scroll">{table((first, *(run.name for run in runs)), rows)}</div>' if rows else ""


def _outcome_rows(runs: Sequence[RunDirectory]) -> Iterator[tuple[str, ...]]:
    """Yield a title and the values of all runs: how long each was, and what was measured, with intervals."""
    yield "state", *(run.state for run in runs)
    yield "steps", *(f"{run.step:,}" for run in runs)
    yield "time", *("" if run.seconds is None else format_duration(run.seconds) for run in runs)
    found = [_measures(run) for run in runs]
    for name in dict.fromkeys(name for measures in found for name in measures):
        yield name, *(measures.get(name, "") for measures in found)


def _measures(run: RunDirectory) -> dict[str, str]:
    """Return metric -> its last value, with its 95% interval where there is one."""
    measures = {}
    for name, value in run.metrics.last_values().items():
        if name != "loss" and not name.startswith("eval_"):
            continue
        if name.endswith(INTERVAL_SUFFIX) or name.removeprefix("eval_") in NOT_MEASURES:
            continue
        width = run.metrics.last(f"{name}{INTERVAL_SUFFIX}")
        measures[name] = format_number(value) + ("" if width is None else f" ± {width:.2g}")
    for evaluation in run.evaluations:
        mark = f" {OTHER_WEIGHTS}" if evaluation.is_of_other_weights else ""
        measures |= {
            f"{evaluation.name}: {name}": show_score(score) + mark for name, score in evaluation.scores.items()
        }
    return measures


def _settings(runs: Sequence[RunDirectory]) -> str:
    """Return the settings in which the runs differ."""
    keys = list(varied_settings(runs))[:MAX_SETTINGS]
    if not keys:
        return "<p>The runs have the same settings.</p>"
    names = short_keys(keys)
    return _table("", runs, [(names[key], *(show_value(setting_of(run, key)) for run in runs)) for key in keys])


def _figure(runs: Sequence[RunDirectory], metric: str, title: str) -> str:
    curves = [
        Curve(run.name, run.metrics[metric].points(), metric != "loss", run.metrics.half_widths(metric))
        for run in runs
        if metric in run.metrics
    ]
    return draw_figure(title, curves)


def _samples(runs: Sequence[RunDirectory]) -> str:
    """Return the last answers of each run to the same questions about the same images."""
    images, parts = ImageBudget(MAX_IMAGE_BYTES), []
    last = [run.samples[max(run.samples)] if run.samples else [] for run in runs]
    for place in range(min(max(map(len, last)), MAX_SAMPLES)):
        answers = [samples[place] if place < len(samples) else None for samples in last]
        parts.append(_sample(next(filter(None, answers)), answers, runs, images))
    return "".join(parts)


def _sample(first: Answer, answers: Sequence[Answer | None], runs: Sequence[RunDirectory], images: ImageBudget) -> str:
    """Return a sample with the answer of each run; a run that was asked something else has none."""
    image = images.embed(first.image, THUMBNAIL) if first.image is not None else ""
    rows = [("question", first.question), ("reference", first.reference)]
    rows += [
        (run.name, answer.answer if answer is not None and answer.question == first.question else "not asked")
        for run, answer in zip(runs, answers, strict=True)
    ]
    texts = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows if value)
    shown = f'<img src="{image}" alt="image of the sample">' if image else ""
    return f'<div class="vlm-sample">{shown}<dl class="vlm-columns">{texts}</dl></div>'
