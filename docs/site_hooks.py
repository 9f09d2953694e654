"""Hooks of MkDocs for `make docs`: the site keeps the repository's paths, so that links work there as on a code host.

The pages are the README, the index `docs/README.md` and the pages that the index lists; the index's tables are the
navigation. A source file that a page links to becomes a page that shows it.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
HOME, INDEX = "README.md", "docs/README.md"
LINK = re.compile(r"(?<=\]\()(?!https?:)([^)#\s]+)(?=[)#])")
FETCHED = re.compile(
    r"<(?:script|img|iframe|link rel=.?(?:stylesheet|icon|preload))[^>]*?(?:src|href)=.?(?:https?:)?//[^>]*"
)
"""What lets a browser fetch something from another host."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json", ".ipynb": "json"}
"""The endings of source files that pages link to -> how they are highlighted."""

SOURCE_PAGE = """---
search: {{exclude: true}}
hide: [toc]
---

# {name}

~~~~~~{language}
{text}
~~~~~~
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation from the index: a section for each of its headings, a page for each row of its tables."""
    nav: list[dict[str, object]] = [{"Home": HOME}, {"All pages": INDEX}]
    for heading, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", read(INDEX), re.MULTILINE | re.DOTALL):
        rows = re.findall(r"^\| \[[^\]]*\]\(([^)]*\.md)\)", body, re.MULTILINE)
        nav.append({heading: [path for path in map(resolve_from_index, rows) if path != HOME]})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the listed pages, the files that they link to, and the style at their paths in the repository."""
    pages = [HOME, INDEX, *(resolve_from_index(path) for path in LINK.findall(read(INDEX)))]
    linked = {resolve(page, link) for page in dict.fromkeys(pages) for link in links(read(page))}
    kept = Files([file for file in files if not is_in_docs(file)])
    for path in sorted({*pages, *linked, *config.extra_css}):
        source = ROOT / path
        if source.suffix in LANGUAGES and source.is_file():
            text = SOURCE_PAGE.format(name=path, language=LANGUAGES[source.suffix], text=read(path))
            kept.append(File.generated(config, f"{path}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV))
        elif source.is_file():
            kept.append(File.generated(config, path, abs_src_path=str(source)))
    return kept


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to source files lead to the pages that show them."""
    if page.file.src_uri.removesuffix(".md").endswith(tuple(LANGUAGES)):
        return markdown
    return LINK.sub(lambda link: link[0] + ".md" if link[0].endswith(tuple(LANGUAGES)) else link[0], markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that a browser would fetch something for from another host."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from another host: {found[0]}")
    return output


def is_in_docs(file: File) -> bool:
    """Return whether a file was found in `docs_dir`, rather than brought by the theme."""
    return file.abs_src_path is not None and Path(file.abs_src_path).parent == ROOT / "docs"


def read(path: str) -> str:
    """Return the text of a file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def links(text: str) -> list[str]:
    """Return the relative links of a page, those in code left out."""
    return LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def resolve(page: str, link: str) -> str:
    """Return the path in the repository that a page's link leads to."""
    return normpath(join(dirname(page), link))


def resolve_from_index(link: str) -> str:
    """Return the path in the repository that a link of the index leads to."""
    return resolve(INDEX, link)
