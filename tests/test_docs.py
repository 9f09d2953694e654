"""The documentation names what there is: files in the figure, packages in the map, pages in the index."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "vlm"
PAGES = ("README.md", "CONTRIBUTING.md", "installation.md", "docs/README.md", "docs/architecture.md")


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


def test_the_readme_names_every_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    packages = {file.parent.name for file in SOURCE.glob("*/__init__.py")}
    named = set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE))
    assert packages - named == set()


def test_the_index_lists_every_page():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", text))
    assert listed == {file.name for file in (ROOT / "docs").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text)
    files = re.findall(r"`((?:src|tests|docs|assets)/[\w./-]+)`", text)
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert missing + [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize(("file", "name"), re.findall(
    r"\[(src/vlm/[\w/]+\.py)\]\([^)]*\), `(\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")
))  # fmt: skip
def test_what_the_readme_points_at_is_there(file: str, name: str):
    assert re.search(rf"^(?:def|class) {name}\b|^{name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
