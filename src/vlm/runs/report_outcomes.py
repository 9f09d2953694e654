"""Sections of a run's report on results, with intervals, answers and plots, and on records that were left out.

Each function returns HTML, empty if a run has nothing to say.
"""

import re

from vlm.config.short_names import show_value
from vlm.runs.files import as_number, mapping_at, number_at, text_at
from vlm.runs.html import ImageBudget, details, table, text
from vlm.runs.listing import format_number
from vlm.runs.metrics import INTERVAL_SUFFIX
from vlm.runs.read import RunDirectory
from vlm.runs.samples import Answer

MAX_SAMPLES, MAX_STEPS = 12, 20
"""Number of samples of a step, and number of steps, that a page shows."""
MAX_REASONS, MAX_EXAMPLES = 20, 3
MAX_PLOTS = 40
OTHER_WEIGHTS = "of other weights"
OTHER_WEIGHTS_NOTE = (
    "Results of other weights were measured before the run's model was replaced; vlm eval with --overwrite renews them."
)
THUMBNAIL = 224
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second")

Score = tuple[float | None, float | None, float | None]


def show_score(score: Score) -> str:
    """Return a value with its 95% interval."""
    value, low, high = score
    if value is None:
        return "undefined"
    return format_number(value) + (
        "" if low is None or high is None else f" [{format_number(low)}, {format_number(high)}]"
    )


def evaluation(run: RunDirectory, images: ImageBudget) -> str:
    """Return the last evaluation during training, the results of `vlm eval`, and what the run gained and forgot."""
    parts = [_last_evaluation(run)]
    for found in run.evaluations:
        records = text_at(found.results, "records")
        rows = [(name, show_score(score)) for name, score in found.scores.items()]
        if rows:
            title = f"vlm eval: {found.name}" + (f", {records} records" if records else "")
            stale = f"<p class='warning'>{text(OTHER_WEIGHTS_NOTE)}</p>" if found.is_of_other_weights else ""
            parts.append(f"<h3>{text(title)}</h3>{stale}{table(('metric', 'value [95% interval]'), rows)}")
    for file in run.files.files("before_after/moved.png"):
        if image := images.embed(file):
            parts.append(
                f'<h3>Before and after</h3><div class="plots single"><img src="{image}" alt="What moved"></div>'
            )
    return "".join(parts)


def _last_evaluation(run: RunDirectory) -> str:
    columns = run.metrics.starting_with("eval_")
    named = {
        name: column
        for name, column in columns.items()
        if name not in NO_METRICS and not name.endswith(INTERVAL_SUFFIX) and column.values
    }
    if not named:
        return ""
    rows = []
    for name, column in named.items():
        width = columns.get(f"{name}{INTERVAL_SUFFIX}")
        spread = f" ± {width.values[-1]:.2g}" if width is not None and width.values else ""
        best = ""
        if len(column.values) > 1:
            low, high = min(column.values), max(column.values)
            best = f"{format_number(low)} to {format_number(high)}"
        rows.append((name, f"{format_number(column.values[-1])}{spread}", best))
    step = max(column.steps[-1] for column in named.values())
    return f"<h3>At step {step:,}</h3>" + table(("metric", "value ± 95%", "over the run"), rows)


def heads(run: RunDirectory, images: ImageBudget) -> str:
    """Return the measures of prediction heads with intervals and the baseline, and their plots."""
    parts = []
    for records in run.heads:
        for head in mapping_at(run.heads, records):
            facts = mapping_at(run.heads, records, head)
            baseline, blank = mapping_at(facts, "baseline"), mapping_at(facts, "blank_pictures")
            header = ["measure", "value [95% interval]", "baseline", *(["blank images"] if blank else [])]
            rows = [
                [name, _show(score), _show(baseline.get(name)), *([_show(blank.get(name))] if blank else [])]
                for name, score in mapping_at(facts, "scores").items()
            ]
            note = text_at(facts, "note")
            title = f"{head}, {records}: {text_at(facts, 'records')} records"
            below = f"<p class='muted'>{text(note)}</p>" if note else ""
            parts.append(f"<h3>{text(title)}</h3>{below}{table(header, rows)}")
    plots = list(run.files.files("scores/**/*.png", MAX_PLOTS))
    embedded = [(file, images.embed(file)) for file in plots]
    figures = "".join(
        f"<div><small>{text(file.relative_to(run.path / 'scores').with_suffix(''))}</small>"
        f'<img src="{image}" alt="{text(file.stem)}"></div>'
        for file, image in embedded
        if image
    )
    return "".join(parts) + (f'<div class="plots">{figures}</div>' if figures else "")


def _show(score: object) -> str:
    found = mapping_at({"score": score}, "score")
    return (
        show_score((as_number(found.get("value")), number_at(found, "low"), number_at(found, "high"))) if found else ""
    )


def samples(run: RunDirectory, images: ImageBudget) -> str:
    """Return the last sample answers with their images, and the answers at earlier steps."""
    if not run.samples:
        return ""
    steps = sorted(run.samples)
    shown = run.samples[steps[-1]][:MAX_SAMPLES]
    cards = "".join(sample_card(sample, images) for sample in shown)
    parts = [f'<h3>At step {steps[-1]:,}</h3><div class="samples">{cards}</div>']
    earlier = steps[:-1][-MAX_STEPS:]
    if earlier:
        header = ("question", *(f"step {step:,}" for step in earlier))
        rows = [
            (sample.question, *(_answer_at(run, step, place) for step in earlier)) for place, sample in enumerate(shown)
        ]
        parts.append(details("Answers at earlier steps", table(header, rows)))
    return "".join(parts)


def _answer_at(run: RunDirectory, step: int, place: int) -> str:
    answers = run.samples[step]
    return answers[place].answer if place < len(answers) else ""


def sample_card(sample: Answer, images: ImageBudget) -> str:
    """Return a sample with its image, question, reference and answer."""
    image = images.embed(sample.image, THUMBNAIL) if sample.image is not None else ""
    picture = f'<img src="{image}" alt="">' if image else ""
    rows = {"question": sample.question, "reference": sample.reference, "answer": sample.answer}
    texts = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in rows.items())
    return f'<div class="sample">{picture}<dl>{texts}</dl></div>'


def skipped_records(run: RunDirectory) -> str:
    """Return how many records were left out for each reason, with a few examples."""
    if not run.skipped:
        return ""
    reasons: dict[str, list[str]] = {}
    for line in run.skipped:
        reason = group_reason(text_at(line, "reason"), text_at(line, "file"))
        reasons.setdefault(reason, []).append(text_at(line, "id") or show_value(line.get("record")))
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))[:MAX_REASONS]
    rows = [(f"{len(ids):,}", reason, ", ".join(ids[:MAX_EXAMPLES])) for reason, ids in ordered]
    more = len(reasons) - MAX_REASONS
    note = f"<small>{more:,} more reasons; skipped.jsonl lists all records.</small>" if more > 0 else ""
    return (
        f"<p>{len(run.skipped):,} records were left out.</p>"
        + table(("records", "reason", "for example"), rows, numeric=(0,))
        + note
    )


def group_reason(reason: str, file: str = "") -> str:
    """Return a reason without the details of a single record: its file, paths and numbers."""
    if file:
        reason = reason.replace(file, "…")
    reason = re.sub(r"(?<![\w…])(?:/[^\s:,;'\"]+)+", "…", reason)
    return re.sub(r"\d[\d,.]*", "N", reason)[:300]
