"""HTML of an evaluation: its metrics, and its worst answers with their images; all text is escaped."""

from collections.abc import Sequence

from vlm.runs.evaluations import Evaluation
from vlm.runs.html import ImageBudget
from vlm.runs.listing import format_number
from vlm.runs.report_outcomes import Score, show_score
from vlm.web.html import note_html, text_html
from vlm.web.results import JudgedAnswer, describe_results, left_out

MAX_IMAGE_BYTES = 4 << 20
"""Bytes of all images of a page of answers together."""
THUMBNAIL_SIDE = 192
"""Pixels of the longer side of an image next to an answer."""


def results_html(evaluation: Evaluation) -> str:
    """Return the metrics of an evaluation with their intervals, and what they leave out."""
    rows = "".join(
        f"<tr><td>{text_html(name)}</td><td class='number'>{show_score((score[0], None, None))}</td>"
        f"<td class='number'>{_interval(score)}</td></tr>"
        for name, score in evaluation.scores.items()
    )
    head = "<tr><th>Metric</th><th class='number'>Value</th><th class='number'>95% interval</th></tr>"
    table = f'<table class="vlm-table"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    notes = "".join(map(note_html, left_out(evaluation.results)))
    title = text_html(describe_results(evaluation.results))
    return f'<section class="vlm-results"><h3>{title}</h3>{table}{notes}</section>'


def worst_html(answers: Sequence[JudgedAnswer]) -> str:
    """Return the answers that are least like their references, with their images."""
    if not answers:
        return ""
    images, parts = ImageBudget(MAX_IMAGE_BYTES), ["<h3>Answers furthest from their references</h3>"]
    for answer in answers:
        rows = [("question", answer.question), ("reference", " | ".join(answer.references))]
        rows += [("could not be answered", answer.error)] if answer.error else [("answer", answer.answer)]
        texts = "".join(f"<dt>{name}</dt><dd>{text_html(text)}</dd>" for name, text in rows if text)
        title = f"<p class='vlm-note'>record {text_html(answer.source)}</p>" if answer.source else ""
        address = images.embed(answer.image, THUMBNAIL_SIDE) if answer.image is not None else ""
        image = f'<img src="{address}" alt="image of the record">' if address else ""
        parts.append(f'<div class="vlm-sample">{image}<div>{title}<dl>{texts}</dl></div></div>')
    return f'<section class="vlm-results">{"".join(parts)}</section>'


def _interval(score: Score) -> str:
    _, low, high = score
    return "" if low is None or high is None else f"{format_number(low)} to {format_number(high)}"
