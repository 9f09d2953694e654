"""Blocks of code, settings and records in the pages are what they claim to be; commands within sentences exist."""

import ast
import importlib.util
import json
import re
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
import yaml

from tests.pages.blocks import PAGES, ROOT, Block, read_blocks, read_spans
from tests.pages.checks import MisunderstoodError, check_vlm
from tests.pages.place import Place
from vlm.cli.main import COMMANDS, main
from vlm.config.packaged import group_names

FOREIGN_MODULES = ("sentence_transformers",)
"""Modules that pages import and this environment lacks."""
GROUPS = sorted(group_names(), key=len, reverse=True)


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in some languages."""
    return [block for page in PAGES for block in read_blocks(page) if block.language in languages]


def name(block: object) -> str:
    """The name of a test: where its block begins."""
    return f"{block.page}:{block.line}" if isinstance(block, Block) else str(block)


@pytest.mark.parametrize("block", blocks("python"), ids=name)
def test_python_compiles_and_what_it_imports_is_there(block: Block):
    tree = ast.parse(block.text, name(block))
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
            if modules[0].split(".")[0] in ("vlm", "transformers", "torch"):
                missing = [alias.name for alias in node.names if not hasattr(import_module(modules[0]), alias.name)]
                assert not missing, f"{name(block)}: {modules[0]} has no {', '.join(missing)}"
        for module in modules:
            top = module.split(".")[0]
            if top not in FOREIGN_MODULES and not top.startswith("my_"):
                assert importlib.util.find_spec(top) is not None, f"{name(block)}: there is no module {module}"


@pytest.mark.parametrize("block", blocks("yaml"), ids=name)
def test_yaml_composes(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run of one's own, or a choice of a group, whose folder is in the block's first line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    place = Place(tmp_path, tmp_path / "checkpoint")
    place.provide_named(block.text)
    group = next((group for group in GROUPS if re.search(rf"{group}/", block.text.partition("\n")[0])), None)
    file = tmp_path / (f"{group}/mine.yaml" if group else "mine.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text)
    assert group or "defaults" in yaml.safe_load(block.text), f"{name(block)}: neither a run nor a choice of a group"
    run = ["-cn", "pretrain-smol", f"{group}=mine"] if group else ["-cn", "mine"]
    words = ["--config-dir", str(tmp_path), *run, "trainer.starts_from=null"]
    if "path:" not in block.text:
        words.append("dataset.path=x.json")
    if "from_pretrained:" not in block.text and not group:
        words.append("trainer.from_pretrained=outputs/earlier/final")  # a second stage is refused without
    check_vlm(words, place)


@pytest.mark.parametrize("block", blocks("json", "jsonl"), ids=name)
def test_json_is_json(block: Block):
    text = block.text.replace("[…]", "[]")
    try:
        json.loads(text)
    except json.JSONDecodeError:
        for line in text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_exist(page: str):
    """Subcommands, their options, modules, scripts and targets of the Makefile; what `…` stands for is not asked."""
    wrong = []
    for line, span in read_spans(page):
        words = span.replace("|", " ").split()
        try:
            _check_span(words)
        except MisunderstoodError as error:
            wrong.append(f"{page}:{line}: `{span}`: {error}")
    assert not wrong, "\n".join(wrong)


def _check_span(words: list[str]) -> None:
    if words[:1] == ["make"] and len(words) > 1 and "…" not in words[1]:
        targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        if words[1] not in targets:
            raise MisunderstoodError("no such target")
    elif words[:1] == ["vlm"] and len(words) > 1 and words[1][0].isalpha():
        if words[1] not in (*COMMANDS, "help"):
            raise MisunderstoodError("no such command")
        known = help_of(*words[1:3]) if words[1] == "data" and len(words) > 2 else help_of(words[1])
        options = [word.split("=")[0].rstrip(",.;:") for word in words[2:] if word.startswith("--") and word != "--"]
        if unknown := [option for option in options if not re.search(rf"{option}\b", known)]:
            raise MisunderstoodError(f"no option {', '.join(unknown)}")
    elif words[:2] == ["python", "-m"] and words[2].startswith(("vlm", "benchmarks")) and "…" not in words[2]:
        if importlib.util.find_spec(words[2]) is None:
            raise MisunderstoodError("no such module")
    elif words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py") and not (ROOT / words[1]).is_file():
        raise MisunderstoodError("no such file")


@cache
def help_of(*words: str) -> str:
    """What a subcommand says of itself."""
    said = StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit):
        main([*words, "--help"])
    return said.getvalue()
