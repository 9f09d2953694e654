"""The notebook is small and without outputs, its commands are understood, its Python compiles, and its cells run."""

import ast
import contextlib
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.hub.server import LocalHub
from tests.pages.blocks import ROOT, Block, Command, read_block_commands
from tests.pages.checks import MisunderstoodError, check_command
from tests.pages.place import Place
from tests.pages.stage import Stage, reason_to_skip, write_base

PATH = "examples/notebook.ipynb"
NOTEBOOK = json.loads((ROOT / PATH).read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TEXTS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"]
MAGICS = ("%cd small-vlm",)
"""What a notebook understands besides commands and Python."""


def split_cell(number: int, text: str) -> tuple[list[Command], str]:
    """Return the commands of a cell, and its Python."""
    joined = text.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line not in MAGICS]
    shell = "\n".join(line[1:] for line in lines if line.startswith("!"))
    python = "\n".join(line for line in lines if not line.startswith("!"))
    return read_block_commands(Block(PATH, number, "sh", shell)), python


def test_it_is_small_and_without_outputs():
    assert (ROOT / PATH).stat().st_size < 30_000
    assert (NOTEBOOK["nbformat"], len(CELLS) > 8) == (4, True)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_its_commands_are_understood_and_its_python_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    place, refused, count = Place(tmp_path, tmp_path / "checkpoint"), [], 0
    for number, cell in enumerate(CELLS):
        commands, python = split_cell(number, cell)
        count += len(commands)
        for command in commands:
            try:
                check_command(command, place)
            except MisunderstoodError as error:
                refused.append(str(error))
        for node in ast.walk(ast.parse(python)):
            if isinstance(node, ast.ImportFrom):
                assert importlib.util.find_spec(str(node.module)) is not None
    assert not refused, "\n\n".join(refused)
    assert count > 8


def test_its_links_lead_somewhere():
    links = [link for text in TEXTS for link in re.findall(r"\]\(([^)#]+)\)", text)]
    assert links
    for link in links:
        assert (ROOT / PATH).parent.joinpath(link).exists(), link


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """An empty place with small parts."""
    (tmp_path / "base").mkdir()
    (tmp_path / "work").mkdir()
    write_base(tmp_path / "base")
    return Stage(tmp_path / "work", tmp_path / "base", LocalHub())


@pytest.mark.slow
def test_its_cells_run_on_small_parts(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(stage.folder)
    names: dict[str, object] = {}
    printed = io.StringIO()
    for number, cell in enumerate(CELLS):
        commands, python = split_cell(number, cell)
        for command in commands:
            if reason_to_skip(command) in (None, "needs other parts"):
                done = stage.run(command)
                assert done.returncode == 0, f"{command}\n{(done.stdout + done.stderr)[-3000:]}"
        for plot in re.findall(r"outputs/\S+\.png", python):  # left out of runs in tests
            shutil.copy("cat.png", plot)
        with contextlib.redirect_stdout(printed):
            exec(python, names)
    assert "Which shape is it?" in printed.getvalue()
