"""Samples as people look at them: tokens in runs, supervised ones marked, in a terminal and on a page."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from PIL import Image

from vlm.data.encoding.labels import IGNORE_INDEX

STYLE = (
    "body{font:15px/1.6 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "mark{background:#b7ebc0}.pad{color:#bbb}.image,.video{color:#06c}img{height:96px;margin:2px}"
    "section{border-top:1px solid #ccc;padding:1em 0;overflow-wrap:anywhere}.bad{color:#b00}"
    "small{color:#666}h2{font-size:1em;margin:.2em 0}"
)
COUNTED_KINDS = {"pad": "padding", "image": "image token", "video": "video token"}
"""Kinds of tokens of which only the number is shown."""
GREEN, BLUE, RESET = "\033[30;42m", "\033[34m", "\033[0m"


def token_runs(
    ids: Sequence[int], labels: Sequence[int], mask: Sequence[int], processor: Any
) -> Iterator[tuple[str, list[int]]]:
    """Tokens that stand together and are of one kind: `mark` (supervised), `text`, `image`, `video` or `pad`."""
    media = {processor.video_token_id: "video", processor.image_token_id: "image"}
    run: list[int] = []
    last = ""
    for token, label, attended in zip(ids, labels, mask, strict=True):
        kind = "pad" if not attended else media.get(token) or ("mark" if label != IGNORE_INDEX else "text")
        if run and kind != last:
            yield last, run
            run = []
        run.append(token)
        last = kind
    if run:
        yield last, run


def tokens_as_html(ids: Sequence[int], labels: Sequence[int], mask: Sequence[int], processor: Any) -> str:
    """A row's tokens as HTML; runs of tokens of images and videos and of padding as counts."""
    html = []
    for kind, run in token_runs(ids, labels, mask, processor):
        if kind in COUNTED_KINDS:
            html.append(f'<span class="{kind}">[{len(run)} × {COUNTED_KINDS[kind]}]</span>')
        else:
            text = escape(processor.tokenizer.decode(run)).replace("\n", "⏎<br>")
            html.append(f"<mark>{text}</mark>" if kind == "mark" else text)
    return "".join(html)


def tokens_as_text(ids: Sequence[int], labels: Sequence[int], processor: Any, *, colours: bool) -> str:
    """A sample's tokens for a terminal: supervised ones on green, or between 【 and 】 without colours."""
    text = []
    for kind, run in token_runs(ids, labels, [1] * len(ids), processor):
        said = f"[{len(run)} × {COUNTED_KINDS[kind]}]" if kind in COUNTED_KINDS else processor.tokenizer.decode(run)
        if kind == "mark":
            text.append(f"{GREEN}{said}{RESET}" if colours else f"【{said}】")
        else:
            text.append(f"{BLUE}{said}{RESET}" if colours and kind in COUNTED_KINDS else said)
    return "".join(text)


def render_page(title: str, intro: str, sections: Sequence[str]) -> str:
    """A whole page; `intro` and `sections` are HTML."""
    body = "".join(f"<section>{section}</section>" for section in sections)
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1><p>{intro}</p>{body}"
    )


def thumbnail(image: Image.Image, side: int = 192) -> Image.Image:
    """A small copy of a picture."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    return small
