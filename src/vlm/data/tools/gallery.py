"""`vlm data show --html PAGE`: hundreds of records on one page, to search, filter, sort and open.

The page is one file that needs no network. Everything that comes from records is escaped here, in Python; the script of
the page only hides, shows and reorders what is there, and a content security policy forbids any other one.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from vlm.config.html_page import html_page
from vlm.config.shown import presentable, printable, shorten
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.pages import STYLE as TOKEN_STYLE
from vlm.data.pages import thumbnail, tokens_as_html
from vlm.data.tools.show import ShownRecord
from vlm.data.vision.video import DecodedVideo

THUMBNAIL_SIDE, MAX_THUMBNAILS = 160, 4
"""The longest side of a thumbnail in pixels, and the number that a record has at most."""
THUMBNAIL_BYTES = 8_000_000
"""Bytes of all thumbnails of a page, before base64; images of further records are counted, not shown."""
MAX_TOKENS = 4000
"""Tokens of a conversation that a page shows."""
SNIPPET, CONTEXT = 140, 50
"""Characters of a record's text that are shown before it is opened, and how many of them precede its first reply."""
MAX_REASONS = 12
"""The number of reasons that can be filtered by: the commonest."""

STYLE = """\
body{max-width:88rem}
#filters{display:flex;flex-wrap:wrap;gap:.6rem 1rem;align-items:end;position:sticky;top:0;background:var(--back);
padding:.7rem 0;border-bottom:1px solid var(--line);z-index:1}
#filters label{display:grid;gap:.15rem;font-size:.8rem;color:var(--muted)}
#filters label.wide{flex:1 1 14rem}
#filters input,#filters select,#filters button{font:inherit;font-size:.9rem;color:var(--text);background:var(--panel);
border:1px solid var(--line);border-radius:6px;padding:.3rem .5rem;min-width:0;width:100%;height:2.2rem}
#filters input[type=number]{width:6rem}#filters select{max-width:16rem}#filters button{cursor:pointer;width:auto}
#shown{margin:.8rem 0;color:var(--muted)}
#records{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.8rem;align-items:start}
details{border:1px solid var(--line);border-radius:8px;background:var(--panel);content-visibility:auto;
contain-intrinsic-size:auto 17rem;overflow:hidden}
details[open]{grid-column:1/-1;background:var(--back)}
summary{display:block;cursor:pointer;padding:.7rem}
summary::-webkit-details-marker{display:none}summary:focus-visible{outline-offset:-3px;border-radius:8px}
summary .images{display:flex;gap:.3rem;height:8rem;align-items:center;overflow:hidden;margin-bottom:.5rem}
summary .images.none{height:auto}
summary img{height:auto;max-height:8rem;max-width:100%;margin:0;border-radius:4px}
summary b{font-size:.85rem}summary small{display:block}
summary .text{margin:.3rem 0 0;font-size:.85rem;line-height:1.4}
details .whole{padding:0 .9rem .9rem;border-top:1px solid var(--line)}
details[open] summary .text{display:none}
@media(max-width:40rem){#filters{position:static}#records{grid-template-columns:1fr}#filters select{max-width:none}}
"""
SCRIPT = """\
"use strict";
const list = document.getElementById("records"), shown = document.getElementById("shown");
const cards = [...list.children], field = name => document.getElementById(name);
const texts = new Map(cards.map(card => [card, card.textContent.toLowerCase()]));
const number = (name, otherwise) => field(name).value === "" ? otherwise : Number(field(name).value);
function filter() {
  const words = field("search").value.toLowerCase().split(/\\s+/).filter(Boolean);
  const source = field("source").value, verdict = field("verdict").value, images = field("images").value;
  const least = number("least", 0), most = number("most", Infinity);
  let count = 0;
  for (const card of cards) {
    const data = card.dataset, tokens = Number(data.tokens);
    const fits = (!source || data.source === source)
      && (!verdict || data.verdict === verdict || data.reason === verdict)
      && (!images || (images === "4" ? Number(data.images) >= 4 : data.images === images))
      && tokens >= least && tokens <= most && words.every(word => texts.get(card).includes(word));
    card.hidden = !fits;
    count += fits;
  }
  shown.textContent = `${count} of ${cards.length} records`;
}
function sort() {
  const [key, sign] = field("order").value.split(" ");
  const ordered = key === "place" ? cards
    : [...cards].sort((a, b) => sign * (Number(a.dataset[key]) - Number(b.dataset[key])));
  list.append(...ordered);
}
for (const name of ["search", "source", "verdict", "images", "least", "most"])
  field(name).addEventListener("input", filter);
field("order").addEventListener("input", sort);
document.querySelector("#filters").addEventListener("reset", () => setTimeout(() => { filter(); sort(); }));
document.querySelector("#filters").addEventListener("submit", event => event.preventDefault());
filter();
"""


@dataclass(frozen=True)
class Gallery:
    """A gallery page, and what is on it: records that are used and left out, and images without a thumbnail."""

    page: str
    used: int
    left_out: int
    images_not_shown: int

    def __str__(self) -> str:
        """Return the counts and the size of the page."""
        size = len(self.page.encode()) / 1e6
        return f"{self.used + self.left_out} records: {self.used} used, {self.left_out} left out; {size:.1f} MB"


def make_gallery(records: Iterable[ShownRecord], processor: str = "") -> Gallery:
    """Make the page of some records, each of which is read, drawn and forgotten; `processor` describes the run's."""
    cards: list[str] = []
    sources: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    thumbnails = Thumbnails()
    for record in records:
        sources[record.source.name] += 1
        if record.problem is not None:
            reasons[reason_without_names(record.problem)] += 1
        cards.append(_card(record, thumbnails))
    left_out = reasons.total()
    used = len(cards) - left_out
    hidden = thumbnails.num_left_out
    intro = f"<p>{used} records are used, {left_out} left out. <mark>Marked</mark> tokens are supervised. "
    room = f"{THUMBNAIL_BYTES / 1e6:g} MB"
    intro += f"{hidden} images are not shown: a page has at most {room} of thumbnails.</p>" if hidden else "</p>"
    intro += f'<p class="muted">{escape(printable(processor))}</p>' if processor else ""
    body = f'{intro}{_filters(sources, reasons)}<p id="shown" role="status" aria-live="polite"></p>'
    body += f'<div id="records">{"".join(cards)}</div><script>{SCRIPT}</script>'
    page = html_page("Records", body, style=TOKEN_STYLE + STYLE, head=_security_policy())
    return Gallery(page, used, left_out, hidden)


def write_gallery(records: Iterable[ShownRecord], path: Path, processor: str = "") -> Gallery:
    """Write the page of some records, see `make_gallery`."""
    gallery = make_gallery(records, processor)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(gallery.page, encoding="utf-8")
    return gallery


def reason_without_names(reason: str) -> str:
    """Return why a record is left out, without paths and numbers, so that equal reasons are counted together."""
    return shorten(re.sub(r"\d+", "N", re.sub(r"\S*/\S+|\S+\.\w{3,4}\b", "…", reason)))[:100]


class Thumbnails:
    """Makes thumbnails within the bytes that a page has for them."""

    def __init__(self):
        self._left = THUMBNAIL_BYTES
        self.num_left_out = 0

    def as_html(self, images: Sequence[Image.Image]) -> str:
        """Return the first images of a record as HTML, and how many more there are."""
        elements = []
        for image in images[:MAX_THUMBNAILS]:
            buffer = BytesIO()
            thumbnail(image, THUMBNAIL_SIDE).save(buffer, "WEBP", quality=60)
            if buffer.tell() > self._left:
                break
            self._left -= buffer.tell()
            address = base64.b64encode(buffer.getvalue()).decode()
            elements.append(f'<img loading="lazy" src="data:image/webp;base64,{address}" alt="">')
        more = len(images) - len(elements)
        self.num_left_out += more
        text = f"<small>+{more} images</small>" if more else "" if images else "<small>no image</small>"
        style = "images" if elements else "images none"
        return f'<span class="{style}">{"".join(elements)}{text}</span>'


def _card(record: ShownRecord, thumbnails: Thumbnails) -> str:
    """Return a record as an element that opens; its attributes are what the page filters and sorts by."""
    images: list[Image.Image] = []
    for image in record.images:
        images += image.frames[:1] if isinstance(image, DecodedVideo) else [image]
    tokens = sum(len(encoded.input_ids) for _, encoded in record.sides)
    supervised = sum(label != IGNORE_INDEX for _, encoded in record.sides for label in encoded.labels)
    place = record.source.name if record.record is None else f"{record.source.name} {record.record}"
    if record.problem is None:
        verdict, snippet = "used", _snippet(*record.texts())
        counts = f"{tokens} tokens, {supervised} supervised"
        whole = _tokens(record)
    else:
        verdict, counts = "left out", "left out"
        text = presentable(record.problem)
        snippet = escape(_cut(text, SNIPPET))
        raw = json.dumps(record.raw, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>")[:4000]
        whole = f'<p class="bad">left out: {escape(text)}</p><pre>{escape(printable(raw))}</pre>'
    attributes = {
        "source": record.source.name,
        "verdict": verdict,
        "tokens": tokens,
        "supervised": supervised,
        "images": len(images),
        "reason": reason_without_names(record.problem) if record.problem else "",
    }
    data = "".join(f' data-{name}="{escape(printable(str(value)))}"' for name, value in attributes.items())
    notes = "".join(f"<p>{escape(presentable(note))}</p>" for note in record.notes)
    style = "muted" if record.problem is None else "bad"
    name = "" if record.id in ("", "?") else f"<small>id {escape(presentable(record.id))}</small>"
    return (
        f"<details{data}><summary>{thumbnails.as_html(images)}<b>{escape(printable(place))}</b> "
        f'{name}<small class="{style}">{counts}</small>'
        f'<p class="text">{snippet}</p></summary>'
        f'<div class="whole">{notes}{whole}</div></details>'
    )


def _snippet(before: str, reply: str) -> str:
    """Return the reply, marked, and the end of what comes before it."""
    before, reply = (" ".join(shorten(printable(text)).split()) for text in (before, reply))
    if len(before) > CONTEXT:
        before = f"… {before[-CONTEXT:].partition(' ')[2] or before[-CONTEXT:]}"
    marked = f" <mark>{escape(_cut(reply, SNIPPET - len(before)))}</mark>" if reply else ""
    return escape(before) + marked


def _cut(text: str, length: int) -> str:
    """Return a text of at most about `length` letters, with an ellipsis where it goes on."""
    return text if len(text) <= length else f"{text[:length].rpartition(' ')[0] or text[:length]} …"


def _tokens(record: ShownRecord) -> str:
    """Return the tokens of a record, or of both sides of a preference, with supervised ones marked."""
    processor, shown = record.source.encoder.processor, ""
    for name, encoded in record.sides:
        ids, labels = encoded.input_ids[:MAX_TOKENS], encoded.labels[:MAX_TOKENS]
        weights = None if encoded.weights is None else encoded.weights[:MAX_TOKENS]
        more = len(encoded.input_ids) - len(ids)
        shown += (f"<h3>{escape(name)}</h3>" if name else "") + "<p>"
        shown += tokens_as_html(ids, labels, [1] * len(ids), processor, weights)
        shown += f" <small>… and {more} more tokens</small></p>" if more else "</p>"
    return shown


def _filters(sources: Counter[str], reasons: Counter[str]) -> str:
    """Return the controls that filter and sort."""
    chosen = [("used", "used"), ("left out", "left out")]
    chosen += [(reason, f"{number} × {reason}") for reason, number in reasons.most_common(MAX_REASONS)]
    images = [("0", "none"), ("1", "1"), ("2", "2"), ("3", "3"), ("4", "4 or more")]
    orders = [("tokens 1", "shortest first"), ("tokens -1", "longest first"), ("supervised -1", "most supervised")]
    source = _select("source", "Source", [(name, f"{name} ({number})") for name, number in sources.items()])
    return (
        '<form id="filters" role="search"><label class="wide">Search<input id="search" type="search" '
        'placeholder="words in texts, ids and reasons" autofocus></label>'
        f"{source}{_select('verdict', 'Verdict', chosen)}{_select('images', 'Images', images)}"
        '<label>Tokens from<input id="least" type="number" min="0"></label>'
        '<label>to<input id="most" type="number" min="0"></label>'
        f'{_select("order", "Order", orders, ("place 1", "as in the data"))}<button type="reset">Reset</button></form>'
    )


def _select(name: str, title: str, options: Sequence[tuple[str, str]], first: tuple[str, str] = ("", "all")) -> str:
    """Return a drop-down list with its label; `options` are pairs of a value and what is shown."""
    shown = "".join(
        f'<option value="{escape(printable(value))}">{escape(printable(text))}</option>'
        for value, text in (first, *options)
    )
    return f'<label>{title}<select id="{name}">{shown}</select></label>'


def _security_policy() -> str:
    """Return the element that lets the page's own script run and no other, and nothing be fetched."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">"
