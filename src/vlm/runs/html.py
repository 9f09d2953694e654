"""Pieces of HTML that pages about runs share; all text is escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from vlm.config.secrets import mask
from vlm.config.shown import printable
from vlm.runs.charts import STYLE as CHART_STYLE

MAX_IMAGE_BYTES = 32 << 20
MAX_IMAGE_PIXELS = 64_000_000
"""The largest image file that a page embeds a small copy of."""
MAX_TEXT = 2000
"""Maximum number of characters of a foreign text that a page shows."""

STYLE = (
    CHART_STYLE
    + """\
.meta{color:var(--muted);margin:.2rem 0}.state{border:1px solid var(--line);border-radius:1rem;padding:.1rem .7rem;
font-size:.85rem;white-space:nowrap}.state.done{color:var(--good)}.state.failed,.state.refused{color:var(--bad)}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0;padding:0;list-style:none}
.tiles li{background:var(--panel);border-radius:8px;padding:.5rem .9rem;min-width:7rem}
.tiles b{display:block;font-size:1.15rem;font-variant-numeric:tabular-nums}
.tiles span{color:var(--muted);font-size:.85rem}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
.sample{background:var(--panel);border-radius:8px;padding:.8rem}.sample img{display:block;border-radius:4px;
margin-bottom:.5rem;max-height:160px}dl{margin:0}dt{color:var(--muted);font-size:.8rem}dd{margin:0 0 .4rem;
white-space:pre-wrap}.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1rem}
.plots img{background:#fff;border-radius:6px;width:100%}
.plots.single{max-width:44rem;grid-template-columns:1fr}
summary{cursor:pointer}nav a{margin-right:1rem;white-space:nowrap}
table{overflow-wrap:normal}td{max-width:34rem;overflow-wrap:break-word}h2+table,h3+table{margin-top:.3rem}
@media(max-width:640px){.chart{overflow:visible}.chart text{font-size:20px}}.plots{align-items:start}
.warning,.hint{border-left:4px solid var(--bad);margin:.5rem 0;padding:.3rem .8rem;background:var(--panel)}
.hint{border-color:var(--line);color:var(--muted)}pre{white-space:pre-wrap}
"""
)
"""The style of pages about runs, in addition to that of all pages."""


def text(value: object, most: int = MAX_TEXT) -> str:
    """Return a text as HTML: escaped, without secrets or invisible control characters, and of limited length."""
    shown = mask(str(value))
    return escape(printable(shown if len(shown) <= most else f"{shown[:most]}…"))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, numeric: Sequence[int] = ()) -> str:
    """Return a table of texts; the columns with the indices `numeric` are aligned to the right."""

    def cell(tag: str, place: int, value: object) -> str:
        """Return a cell of the table as HTML."""
        kind = ' class="number"' if place in numeric else ""
        return f"<{tag}{kind}>{text(value)}</{tag}>"

    head = "".join(cell("th", place, value) for place, value in enumerate(header))
    body = "".join(f"<tr>{''.join(cell('td', place, value) for place, value in enumerate(row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def section(title: str, body: str) -> str:
    """Return a part of a page under a heading, which `navigation` can lead to; empty without a body, which is HTML."""
    return f'<section id="{anchor(title)}"><h2>{text(title)}</h2>{body}</section>' if body else ""


def anchor(title: str) -> str:
    """Return the name of a heading in an address."""
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def details(summary: str, body: str) -> str:
    """Return a part that is opened on demand; `body` is HTML."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def embed_image(file: Path, side: int | None = None) -> str:
    """Return an image file as a `data:` address, at most `side` pixels wide and high; empty if it does not open."""
    from PIL import Image

    try:
        if file.stat().st_size > MAX_IMAGE_BYTES:
            return ""
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                return ""
            small = image.convert("RGB") if side is not None else image.convert("RGBA")
            if side is not None:
                small.thumbnail((side, side))
            buffer = io.BytesIO()
            kind, options = ("JPEG", {"quality": 85}) if side is not None else ("PNG", {"optimize": True})
            small.save(buffer, kind, **options)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class ImageBudget:
    """Embeds images into one page as long as all of them together stay small.

    Attributes:
        left: bytes that are left for further images.
        num_left_out: number of images that did not fit.
    """

    def __init__(self, most: int):
        self.left, self.num_left_out = most, 0

    def embed(self, file: Path, side: int | None = None) -> str:
        """Return an image as a `data:` address, see `embed_image`; empty if it does not open or does not fit."""
        image = embed_image(file, side)
        if len(image) > self.left:
            self.num_left_out += 1
            return ""
        self.left -= len(image)
        return image
