"""The documentation names what there is: files in the figure, packages in the map, pages in the index, links."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_imports import ORDER

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "vlm"
PAGES = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "installation.md", "examples/README.md"),
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
)
"""Every page that `make docs` puts into the site."""


@pytest.fixture(scope="module")
def figure() -> ModuleType:
    """The module that draws the figure of docs/architecture.md."""
    spec = importlib.util.spec_from_file_location("draw_paths", ROOT / "assets" / "draw_paths.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_in_the_figure_exists(figure: ModuleType):
    paths = [path for _, _, steps in figure.ROWS for _, _, path in steps]
    assert len(paths) == 21
    assert [path for path in paths if not (SOURCE / path).is_file()] == []


def test_the_figure_is_drawn(figure: ModuleType, tmp_path: Path):
    figure.draw(tmp_path / "paths.png")
    assert (tmp_path / "paths.png").read_bytes()[:4] == b"\x89PNG"


def test_the_map_names_every_package():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {file.parent.name for file in SOURCE.glob("*/__init__.py")}
    named = re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)
    assert packages - set(named) == set()
    assert [name for name in reversed(ORDER) if name in packages] == [name for name in named if name in packages]


def test_the_index_lists_every_page():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[[\w-]+\]\(([\w./-]+\.md)\) \|", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {ROOT.joinpath("docs", name).resolve() for name in listed} == {ROOT / name for name in PAGES} - {
        ROOT / "docs" / "README.md"
    }


def test_the_readme_takes_five_minutes():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    assert lines.index("## Train a small model on one machine") < next(
        number for number, line in enumerate(lines) if "deepspeed" in line
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    files = re.findall(r"`((?:src|tests|docs|assets|examples|benchmarks)/[\w./-]+)`", text)
    made = ("examples/data/",) if page != "CHANGELOG.md" else ("src/", "tests/")  # later, or in the past
    missing = [file for file in files if not (ROOT / file).exists() and not file.startswith(made)]
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", without_code(text)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            missing.append(link)
    assert missing == []


def without_code(text: str) -> str:
    """A page without its fenced blocks, in which brackets are code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that code hosts give to a page's headings."""
    headings = re.findall(r"^#+ (.*)", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("file", "name"), re.findall(
    r"\[(src/vlm/[\w/]+\.py)\]\([^)]*\), `(\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")
))  # fmt: skip
def test_what_the_readme_points_at_is_there(file: str, name: str):
    assert re.search(rf"^(?:def|class) {name}\b|^{name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
