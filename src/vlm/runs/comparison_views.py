"""A comparison of runs for a terminal, and as one HTML page that needs no network."""

import textwrap
from collections.abc import Iterator

from tabulate import tabulate

from vlm.config.html_page import html_page
from vlm.config.short_names import show_value
from vlm.evaluation.bootstrap import Score
from vlm.runs.charts import Curve, draw_figure
from vlm.runs.comparison import NOT_COMPARABLE, MetricRow, RunComparison, sparkline
from vlm.runs.html import STYLE, ImageBudget, section, table, text
from vlm.runs.listing import RunTable
from vlm.runs.report_outcomes import OTHER_WEIGHTS, OTHER_WEIGHTS_NOTE, THUMBNAIL, show_score

COLUMNS = ("state", "step", "loss", "eval_loss", "tokens_per_second", "duration")
TITLES = ("run", "state", "step", "loss", "eval loss", "tokens/s", "duration")
MAX_SAMPLES_SHOWN, MAX_SAMPLES = 3, 24
"""Number of samples that a terminal and a page show."""
MAX_VALUE = 60
"""Characters of a setting that a terminal shows."""
MAX_IMAGE_BYTES = 8 << 20
CURVES = ("loss", "eval_loss")
MORE_CURVES = ("grad_norm", "tokens_per_second")
INDEPENDENT = (
    "Differences are relative to the first run, with 95% intervals over records. Paired intervals compare the same "
    "records; the others treat the runs as independent, so they are too wide if both runs were evaluated on the same "
    "records. No interval covers what another seed would change."
)
NOT_COMPARABLE_NOTE = (
    "Losses of different objectives or heads, and metrics on different evaluation data, are not comparable. "
)
MORE_STYLE = """\
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:.4rem 1rem}
.better{color:var(--good)}.worse{color:var(--bad)}
"""


def describe_comparison(comparison: RunComparison) -> str:
    """Return a comparison for a terminal."""
    parts = [_plain([TITLES, *_run_rows(comparison)])]
    for title, body in (
        ("Settings that differ", _settings_text(comparison)),
        ("Metrics", _metrics_text(comparison)),
        ("Curves", "\n\n".join(_spark_text(comparison, name) for name in CURVES if _has(comparison, name))),
        ("Samples", "\n\n".join(_samples_text(comparison))),
    ):
        if body:
            parts.append(f"{title}\n{'─' * len(title)}\n{body}")
    return "\n\n".join(parts)


def _plain(rows: list[tuple[str, ...]]) -> str:
    return tabulate(rows, "firstrow", tablefmt="plain", disable_numparse=True)


def _run_rows(comparison: RunComparison) -> list[tuple[str, ...]]:
    runs, letters = RunTable(comparison.runs), comparison.labels != comparison.names
    titles = [f"{label}  {name}" if letters else name for label, name in _both(comparison)]
    return [
        (name, *(runs.text(run, column) for column in COLUMNS))
        for name, run in zip(titles, comparison.runs, strict=True)
    ]


def _both(comparison: RunComparison) -> list[tuple[str, str]]:
    return list(zip(comparison.labels, comparison.names, strict=True))


def _setting_rows(comparison: RunComparison) -> list[tuple[str, ...]]:
    settings = [(key, *map(show_value, values)) for key, values in comparison.settings.items()]
    return settings + [(key, *values) for key, values in comparison.surroundings.items()]


def _settings_text(comparison: RunComparison) -> str:
    rows = [tuple(_cut(cell) for cell in row) for row in _setting_rows(comparison)]
    return _plain([("", *comparison.labels), *rows]) if rows else "none"


def _cut(cell: str) -> str:
    return cell if len(cell) <= MAX_VALUE else f"…{cell[-MAX_VALUE:]}"


def _metric_rows(comparison: RunComparison) -> Iterator[tuple[MetricRow, tuple[str, ...]]]:
    for row in comparison.metrics:
        stale = row.other_weights or [False] * len(row.scores)
        cells = [
            "" if score is None else _show(score) + (f" {OTHER_WEIGHTS}" if is_other else "")
            for score, is_other in zip(row.scores, stale, strict=True)
        ]
        for number, difference in enumerate(row.differences):
            if difference is None or difference.value is None:
                verdict = row.verdict(number)
                cells.append(verdict if verdict == NOT_COMPARABLE else "")
                continue
            shown = f"{'+' if difference.value > 0 else ''}{_show(difference)}"
            cells.append(
                " ".join(filter(None, [shown, row.verdict(number), "(paired)" if row.is_paired(number) else ""]))
            )
        name = row.metric if row.place == "training" else f"{row.place}: {row.metric}"
        yield row, (name, *cells)


def _show(score: Score) -> str:
    return show_score((score.value, score.low, score.high))


def _metric_header(comparison: RunComparison) -> tuple[str, ...]:
    others = comparison.labels[1:]
    differences = ["difference"] if len(others) == 1 else [f"{name} − {comparison.labels[0]}" for name in others]
    return ("metric", *comparison.labels, *differences)


def _metrics_text(comparison: RunComparison) -> str:
    rows = [cells for _, cells in _metric_rows(comparison)]
    if not rows:
        return ""
    return f"{_plain([_metric_header(comparison), *rows])}\n\n{textwrap.fill(_notes(comparison), 110)}"


def _notes(comparison: RunComparison) -> str:
    """Return the notes that explain the metrics."""
    others = "The runs were evaluated on different records during training. " if comparison.has_other_records else ""
    rows = comparison.metrics
    stale = [row for row in rows if any(row.other_weights)]
    if any(any(row.incomparable) for row in rows if row not in stale):
        others += NOT_COMPARABLE_NOTE
    return others + (f"{OTHER_WEIGHTS_NOTE} " if stale else "") + INDEPENDENT


def _has(comparison: RunComparison, name: str) -> bool:
    return any(name in run.metrics and run.metrics[name].values for run in comparison.runs)


def _spark_text(comparison: RunComparison, name: str) -> str:
    """Return the curves of a metric as lines of blocks on shared axes."""
    curves = [run.metrics[name].points() if name in run.metrics else [] for run in comparison.runs]
    points = [point for curve in curves for point in curve]
    steps, values = [x for x, _ in points], [y for _, y in points]
    bounds = (min(steps), max(steps), min(values), max(values))
    width = max(map(len, comparison.labels))
    lines = [
        f"{label:<{width}}  {sparkline(curve, bounds)}  {curve[-1][1]:.4g}"
        for label, curve in zip(comparison.labels, curves, strict=True)
        if curve
    ]
    scale = f"{name}, steps {bounds[0]:,} to {bounds[1]:,}, from {bounds[2]:.4g} (▁) to {bounds[3]:.4g} (█)"
    return "\n".join([scale, *lines])


def _samples_text(comparison: RunComparison) -> Iterator[str]:
    width = max(map(len, comparison.labels))
    for sample, answers in comparison.samples[:MAX_SAMPLES_SHOWN]:
        rows = [("question", sample.question), ("reference", sample.reference)]
        rows += [
            (name, "" if one is None else one.answer) for name, one in zip(comparison.labels, answers, strict=True)
        ]
        size = max(width, len("reference"))
        yield "\n".join(f"{label:<{size}}  {textwrap.shorten(value, 100, placeholder=' …')}" for label, value in rows)


def make_comparison_page(comparison: RunComparison) -> str:
    """Return the page of a comparison."""
    images = ImageBudget(MAX_IMAGE_BYTES)
    settings = _setting_rows(comparison)
    curves = "".join(_figure(comparison, name) for name in (*CURVES, *_other_curves(comparison), *MORE_CURVES))
    names = comparison.labels
    body = (
        f'<p class="meta">{len(names)} runs; differences are from {text(comparison.names[0])}</p>'
        + section("Runs", table(TITLES, _run_rows(comparison), numeric=range(2, len(TITLES))))
        + section("Settings that differ", table(("", *names), settings) if settings else "<p>None.</p>")
        + section("Metrics", _metrics_html(comparison))
        + section("Curves", curves)
        + section("Samples", "".join(_samples_html(comparison, images)))
    )
    return html_page(f"{len(names)} runs compared", body, style=STYLE + MORE_STYLE)


def _other_curves(comparison: RunComparison) -> list[str]:
    """Return the names of evaluations' metrics that some run logged twice."""
    names = dict.fromkeys(
        row.metric for row in comparison.metrics if row.place == "training" and row.metric not in CURVES
    )
    return [
        name
        for name in names
        if any(len(run.metrics[name].values) > 1 for run in comparison.runs if name in run.metrics)
    ]


def _figure(comparison: RunComparison, name: str) -> str:
    pairs = zip(comparison.labels, comparison.runs, strict=True)
    return draw_figure(
        name,
        [
            Curve(label, run.metrics[name].points(), name.startswith("eval_"), run.metrics.half_widths(name))
            for label, run in pairs
            if name in run.metrics
        ],
        from_zero=name == "tokens_per_second",
    )


def _metrics_html(comparison: RunComparison) -> str:
    rows = list(_metric_rows(comparison))
    if not rows:
        return ""
    head = "".join(f"<th>{text(name)}</th>" for name in _metric_header(comparison))
    body = ""
    for row, cells in rows:
        kinds = [""] * (1 + len(row.scores)) + [row.verdict(number) for number in range(len(row.differences))]
        body += (
            "<tr>"
            + "".join(
                f'<td class="{kind.split()[0] if kind else "none"}">{text(cell)}</td>'
                for kind, cell in zip(kinds, cells, strict=True)
            )
            + "</tr>"
        )
    notes = f"<p><small>{text(_notes(comparison))}</small></p>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def _samples_html(comparison: RunComparison, images: ImageBudget) -> Iterator[str]:
    for sample, answers in comparison.samples[:MAX_SAMPLES]:
        files = [one.image for one in (sample, *answers) if one is not None and one.image is not None]
        image = next((found for file in files[:2] if (found := images.embed(file, THUMBNAIL))), "")
        picture = f'<img src="{image}" alt="">' if image else ""
        texts = [("question", sample.question), ("reference", sample.reference)]
        head = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in texts)
        columns = "".join(
            f"<dl><dt>{text(name)}</dt><dd>{'' if one is None else text(one.answer)}</dd></dl>"
            for name, one in zip(comparison.labels, answers, strict=True)
        )
        yield f'<div class="sample">{picture}<dl>{head}</dl><div class="answers">{columns}</div></div><br>'
