"""HTML of an evaluation: its metrics, and its worst answers with their images; all text is escaped."""

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from vlm.runs.read import Evaluation
from vlm.web.html import note_html, text_html
from vlm.web.results import JudgedAnswer, describe_results, left_out

THUMBNAIL_SIDE = 192
"""Pixels of the longer side of an image beside an answer."""


def results_html(evaluation: Evaluation) -> str:
    """Return the metrics of an evaluation with their intervals, and what they leave out."""
    rows = "".join(
        f"<tr><td>{text_html(name)}</td><td class='number'>{_number(value)}</td><td class='number'>"
        f"{'' if low is None or high is None else f'{_number(low)} to {_number(high)}'}</td></tr>"
        for name, (value, low, high) in evaluation.scores.items()
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
    parts = ["<h3>Answers furthest from their references</h3>"]
    for answer in answers:
        rows = [("question", answer.question), ("reference", " | ".join(answer.references))]
        rows += [("could not be answered", answer.error)] if answer.error else [("answer", answer.answer)]
        texts = "".join(f"<dt>{name}</dt><dd>{text_html(text)}</dd>" for name, text in rows if text)
        title = f"<p class='vlm-note'>record {text_html(answer.source)}</p>" if answer.source else ""
        parts.append(f'<div class="vlm-sample">{_thumbnail(answer.image)}<div>{title}<dl>{texts}</dl></div></div>')
    return f'<section class="vlm-results">{"".join(parts)}</section>'


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


def _thumbnail(file: Path | None) -> str:
    """Return a small copy of an image as a `data:` address; empty where the file is no image that opens."""
    if file is None or not file.is_file():
        return ""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    content = BytesIO()
    small.save(content, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{b64encode(content.getvalue()).decode()}" alt="image of the record">'
