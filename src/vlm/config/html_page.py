"""The frame of every HTML page that is written to a file: one look, in light and dark, without the network."""

from html import escape

from vlm.config.shown import printable

STYLE = """\
:root{color-scheme:light dark;--text:#1c2024;--muted:#60646c;--line:#e0e3e8;--back:#fff;--panel:#f7f8fa;
--accent:#0b62c4;
--good:#187a3c;--bad:#b3261e;--mark:#b7ebc0}
@media(prefers-color-scheme:dark){:root{--text:#e6e8eb;--muted:#9ba1a9;--line:#33383f;--back:#14171a;--panel:#1c2024;
--accent:#70b0ff;--good:#5fce8a;--bad:#ff8a80;--mark:#1f5c33}}
*{box-sizing:border-box}
body{font:15px/1.6 system-ui,sans-serif;color:var(--text);background:var(--back);max-width:64rem;margin:2rem auto;
padding:0 1rem;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.2rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
a{color:var(--accent)}small,.muted{color:var(--muted)}.good{color:var(--good)}.bad{color:var(--bad)}
section{border-top:1px solid var(--line);padding:1rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
th,td{padding:.3rem .8rem .3rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600}td.number,th.number{text-align:right;white-space:nowrap}
code,pre{font:13px/1.5 ui-monospace,monospace}
pre{background:var(--panel);padding:.8rem;overflow-x:auto;border-radius:6px}
img,svg{max-width:100%}mark{background:var(--mark);color:inherit}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
"""
"""Style of all pages. Colours are variables, so that a page's own style follows light and dark too."""


def html_page(title: str, body: str, *, style: str = "", head: str = "") -> str:
    """Return a whole HTML document, with its title as heading.

    Args:
        title: plain text; it is escaped.
        body: HTML; the caller has escaped what comes from outside.
        style: further CSS of this page.
        head: further HTML of its head, such as a content security policy.
    """
    shown = escape(printable(title))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"{head}<title>{shown}</title><style>\n{STYLE}{style}</style></head>\n"
        f"<body><h1>{shown}</h1>\n{body}\n</body></html>\n"
    )
