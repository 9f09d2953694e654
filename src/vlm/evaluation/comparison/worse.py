"""The records that got worse: as JSON lines, and the first of them as a page with images."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np

from vlm.config.shown import printable
from vlm.data.pages import render_page, thumbnail
from vlm.data.sample import BadSample, ImageRef, Sample
from vlm.data.vision.images import open_image
from vlm.evaluation.comparison.changes import LOSS, RIGHT, Pair, paired_values
from vlm.evaluation.comparison.records import PROBE

NUM_SHOWN = 50
"""Number of records on the page."""
WORSE_FILE, PAGE_FILE = "worse.jsonl", "worse.html"


@dataclass(frozen=True)
class Worse:
    """A record that got worse: its answer, or with an answer as good as before its loss.

    Attributes:
        place: its index among all pairs.
        pair: the record before and after.
        score_before: the value of its answer before; None where it has none.
        score_after: the same after.
    """

    place: int
    pair: Pair
    score_before: float | None
    score_after: float | None

    @property
    def score_drop(self) -> float:
        """How much the value of the answer fell; 0 where it has none."""
        return (self.score_before or 0.0) - (self.score_after or 0.0)

    @property
    def loss_rise(self) -> float:
        """How much the loss of the reply rose; 0 where there is none."""
        before, after = (row.loss for row in self.pair)
        return 0.0 if before is None or after is None else after - before

    def as_row(self) -> dict[str, object]:
        """Return the record as a line of `worse.jsonl`."""
        before, after = self.pair
        return {
            "id": before.id,
            "set": before.dataset,
            **before.groups,
            "media": before.media,
            "prompt": before.prompt,
            "references": before.references,
            "before": before.answer,
            "after": after.answer,
            "score_before": self.score_before,
            "score_after": self.score_after,
            "loss_before": before.loss,
            "loss_after": after.loss,
        }


def find_worse(pairs: Sequence[Pair], metric: str) -> list[Worse]:
    """Return the records that got worse: those whose answers fell most first, then those whose losses rose most.

    `metric` is the one of answers to records of the user's.
    """
    found = []
    for dataset in dict.fromkeys(before.dataset for before, _ in pairs):
        places = [place for place, (before, _) in enumerate(pairs) if before.dataset == dataset]
        rows = [pairs[place] for place in places]
        name = RIGHT if dataset == PROBE else metric
        before, after = paired_values(rows, [name])[name]
        columns = ([None if np.isnan(value) else float(value) for value in column] for column in (before, after))
        found += [Worse(*row) for row in zip(places, rows, *columns, strict=True)]
    worse = [item for item in found if item.score_drop > 0 or (item.score_drop == 0 and item.loss_rise > 0)]
    return sorted(worse, key=lambda item: (-item.score_drop, -item.loss_rise))


def write_worse(worse: Sequence[Worse], samples: Sequence[Sample], folder: Path) -> None:
    """Write `worse.jsonl` with all of them, and `worse.html` with the first `NUM_SHOWN`.

    `samples` are those of all pairs, whose images are shown.
    """
    lines = (json.dumps(item.as_row(), ensure_ascii=False) for item in worse)
    (folder / WORSE_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    shown = worse[:NUM_SHOWN]
    intro = f"The first {len(shown)} of {len(worse):,} records whose answer got worse, or with an answer as good as "
    intro += f"before the loss of their reply. All are in {WORSE_FILE}."
    sections = [_as_html(item, samples[item.place]) for item in shown]
    (folder / PAGE_FILE).write_text(render_page("What got worse", intro, sections), encoding="utf-8")


def _as_html(item: Worse, sample: Sample) -> str:
    """Return a record as a section of the page."""
    before, after = item.pair
    title = f"{before.dataset}, {', '.join(before.groups.values())}: {before.id}"
    lines = {
        "question": before.prompt,
        "reference": " | ".join(before.references),
        "before": _with_numbers(before.answer, item.score_before, before.loss),
        "after": _with_numbers(after.answer, item.score_after, after.loss),
    }
    images = "".join(_image_as_html(image, sample.id) for image in sample.images)
    items = "".join(f"<li><b>{label}</b>: {escape(printable(text))}</li>" for label, text in lines.items())
    return f"<h2>{escape(printable(title))}</h2>{images}<ul>{items}</ul>"


def _with_numbers(answer: str | None, score: float | None, loss: float | None) -> str:
    numbers = [f"{name} {value:.3g}" for name, value in (("score", score), (LOSS, loss)) if value is not None]
    return f"{answer} ({', '.join(numbers)})"


def _image_as_html(image: ImageRef, sample_id: str) -> str:
    """Return a thumbnail of an image; nothing where it does not open any more."""
    buffer = BytesIO()
    try:
        thumbnail(open_image(image, sample_id)).save(buffer, "JPEG", quality=85)
    except BadSample:
        return ""
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'
