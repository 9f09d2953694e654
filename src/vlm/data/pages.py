"""Samples for people: runs of tokens, supervised ones marked, in a terminal and on a page."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from PIL import Image

from vlm.config.html_page import html_page
from vlm.config.shown import printable
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import Processor
from vlm.models.pixels import as_rgb

STYLE = """\
.pad{color:var(--muted)}.image,.video{color:var(--accent)}img{height:96px;margin:2px}h2{font-size:1em;margin:.2em 0}
"""
"""The style of pages with samples, in addition to that of all pages."""
COUNTED_KINDS = {"pad": "padding", "image": "image token", "video": "video token"}
"""Kinds of tokens that are shown as a number."""
GREEN, BLUE, RESET = "\033[30;42m", "\033[34m", "\033[0m"


class Run(NamedTuple):
    """Tokens of one kind next to each other: `mark` (supervised), `text`, or a number of `image`, `video` or `pad`.

    `weight` is how much the loss of each supervised token counts.
    """

    kind: str
    text: str
    weight: float


def token_runs(
    ids: Sequence[int],
    labels: Sequence[int],
    mask: Sequence[int],
    processor: Processor,
    weights: Sequence[float] | None = None,
) -> Iterator[Run]:
    """Yield runs of tokens; without `weights`, the loss of each counts 1."""
    media: dict[int | None, str] = {processor.video_token_id: "video", processor.image_token_id: "image"}
    kinds = [
        "pad" if not attended else media.get(token) or ("mark" if label != IGNORE_INDEX else "text")
        for token, label, attended in zip(ids, labels, mask, strict=True)
    ]
    known = [1.0] * len(kinds) if weights is None else weights
    counting = [weight if kind == "mark" else 1.0 for kind, weight in zip(kinds, known, strict=True)]
    for (kind, weight), group in groupby(zip(kinds, counting, ids, strict=True), itemgetter(0, 1)):
        run = [token for _, _, token in group]
        counted = COUNTED_KINDS.get(kind)
        yield Run(kind, f"[{len(run)} × {counted}]" if counted else str(processor.tokenizer.decode(run)), weight)


def tokens_as_html(
    ids: Sequence[int],
    labels: Sequence[int],
    mask: Sequence[int],
    processor: Processor,
    weights: Sequence[float] | None = None,
) -> str:
    """Return a row's tokens as HTML; image, video and padding tokens as counts.

    The weight of their losses follows supervised tokens if it is not 1; those below 1 are paler, others have a
    darker line below.
    """
    elements = []
    for kind, text, weight in token_runs(ids, labels, mask, processor, weights):
        content = escape(printable(text)).replace("\n", "⏎<br>")
        if kind == "mark" and weight != 1:
            style = f"opacity:{max(weight, 0.3):g}" if weight < 1 else "border-bottom:2px solid #2a7a3b"
            content = f'<mark style="{style}" title="weight {weight:g}">{content}</mark><sup>×{weight:g}</sup>'
        elif kind == "mark":
            content = f"<mark>{content}</mark>"
        elif kind in COUNTED_KINDS:
            content = f'<span class="{kind}">{content}</span>'
        elements.append(content)
    return "".join(elements)


def tokens_as_text(
    ids: Sequence[int],
    labels: Sequence[int],
    processor: Processor,
    weights: Sequence[float] | None = None,
    *,
    colours: bool,
) -> str:
    """Return a sample's tokens for a terminal: supervised ones on green, or in 【 】 without colours.

    The weight of their losses follows these if it is not 1: `【a reply】×0.5`.
    """
    shown = []
    for kind, text, weight in token_runs(ids, labels, [1] * len(ids), processor, weights):
        text = printable(text)
        if kind == "mark":
            factor = "" if weight == 1 else f"×{weight:g}"
            shown.append((f"{GREEN}{text}{RESET}" if colours else f"【{text}】") + factor)
        else:
            shown.append(f"{BLUE}{text}{RESET}" if colours and kind in COUNTED_KINDS else text)
    return "".join(shown)


def render_page(title: str, intro: str, sections: Sequence[str]) -> str:
    """Return an HTML page; `intro` and `sections` are HTML."""
    body = "".join(f"<section>{section}</section>" for section in sections)
    return html_page(title, f"<p>{intro}</p>{body}", style=STYLE)


def thumbnail(image: Image.Image, side: int = 192) -> Image.Image:
    """Return a small copy of an image in RGB."""
    small = as_rgb(image).copy()
    small.thumbnail((side, side))
    return small
