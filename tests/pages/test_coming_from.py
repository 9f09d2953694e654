"""docs/coming-from.md names what there is here, and agrees with what the command line answers to others' names."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.pages.blocks import ROOT, SPAN, Block, read_block_commands, read_page
from tests.pages.checks import check_command, compose_once
from tests.pages.place import Place
from vlm.checks.compose import make_run_config
from vlm.checks.fields import check_fields
from vlm.config.packaged import group_names, packaged_names, run_names
from vlm.config.schema import key_names

PAGE = "docs/coming-from.md"
NAME = re.compile(r"-{0,2}([a-z]\w+)")
OVERRIDE = re.compile(r"(?:model|trainer|dataset|inference)(?:[./]\S*)?=.+")
KEY_OF_MAPPING = re.compile(r"(dataset\.(options|sources|loss_patterns)|model\.processor)\.")
CONNECTOR_OPTIONS = {
    option
    for path in (ROOT / "src" / "vlm" / "config" / "model" / "connector").glob("*.yaml")
    for option in yaml.safe_load(path.read_text(encoding="utf-8"))["options"] or ()
}
"""The options of all packaged connectors."""


@dataclass(frozen=True)
class Row:
    """A row of a table: the names there, and the spans that say what to type here, of both cells behind them.

    Attributes:
        section: the heading above it.
        of_names: whether the names there are flags or keys, and not forms of records or commands.
    """

    line: int
    section: str
    of_names: bool
    theirs: tuple[str, ...]
    here: tuple[str, ...]
    note: tuple[str, ...]


def rows() -> list[Row]:
    """The rows of all tables whose second column is `here`."""
    found, inside, section, header = [], False, "", ""
    for number, line in enumerate(read_page(PAGE).splitlines(), start=1):
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        section = line if line.startswith("## ") else section
        if not cells:
            inside = False
        elif len(cells) > 1 and cells[1] == "here":
            inside, header = True, cells[0]
        elif inside and not line.startswith("|---"):
            spans = [tuple(SPAN.findall(cell)) for cell in cells]
            note = spans[2] if len(spans) > 2 else ()
            found.append(Row(number, section, header == "theirs", spans[0], spans[1], note))
            assert spans[1] or cells[1] == "—", f"{PAGE}:{number}: what is it here?"
    return found


ROWS = rows()


def overrides() -> list[str]:
    """Every override that the tables name."""
    spans = [word for row in ROWS for span in (*row.here, *row.note) for word in split(span)]
    return list(dict.fromkeys(word for word in spans if OVERRIDE.fullmatch(word)))


def split(span: str) -> list[str]:
    """The words of a span that holds several overrides; a value may have blanks in it."""
    return re.split(r" (?=(?:model|trainer|dataset)[./]\S+=)", span)


def test_the_tables_are_found():
    assert len(ROWS) > 150
    assert len(overrides()) > 120


def test_every_choice_and_every_run_exists():
    groups = set(group_names())
    for word in overrides():
        name, _, choice = word.partition("=")
        if name in groups and choice != "…":
            assert choice in packaged_names("vlm.config", name, ".yaml"), word
        elif "/" in name:
            assert name in groups, word
    for row in ROWS:
        for span in (*row.here, *row.note):
            if match := re.match(r"(?:vlm )?-cn (\S+)", span):
                assert match[1] in run_names(), span


def test_every_key_exists_and_every_value_is_allowed():
    """The keys are composed together, as many as differ at a time."""
    batches: list[dict[str, str]] = []
    for word in overrides():
        key, _, value = word.partition("=")
        if "/" in key or key == "model":
            continue
        if key.startswith("model.connector.options."):
            assert key.rpartition(".")[2] in CONNECTOR_OPTIONS, word
            continue
        if value == "…" and not KEY_OF_MAPPING.match(key):
            section, _, last = key.rpartition(".")
            assert last in key_names(section), word
        elif value != "…":
            batch = next((batch for batch in batches if key not in batch), None)
            if batch is None:
                batches.append(batch := {})
            batch[key] = value
    assert batches
    for batch in batches:
        words = {"dataset.path": "x", **batch}
        config = make_run_config(compose_once("pretrain-smol", [f"{key}={value}" for key, value in words.items()]))
        check_fields(config)


def test_every_command_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, tmp_path)
    commands = [(row.line, span) for row in ROWS for span in row.here if span.startswith("vlm ")]
    assert len(commands) > 15
    for line, span in {span: (line, span) for line, span in commands}.values():
        (command,) = read_block_commands(Block(PAGE, line, "sh", span))
        check_command(command, place)


@pytest.mark.skipif(importlib.util.find_spec("vlm.config.aliases") is None, reason="the command line has no aliases")
def test_the_page_agrees_with_what_the_command_line_answers():
    from vlm.config.aliases import find_alias  # pyright: ignore[reportMissingImports]

    keys_here: dict[tuple[str, str], set[str]] = {}
    for row in ROWS:
        keys = {word.partition("=")[0] for span in (*row.here, *row.note) for word in split(span)}
        for match in filter(None, map(NAME.match, row.theirs if row.of_names and row.here else ())):
            keys_here.setdefault((row.section, match[1]), set()).update(keys)
    differing, compared = [], 0
    for (section, name), keys in keys_here.items():
        if alias := find_alias(name):
            compared += 1
            if not keys & set(re.findall(r"[\w./]+(?==)", f"{alias.use} {alias.note}")):
                differing.append(f"{section}: {name} is {alias.use} on the command line")
    assert compared > 60
    assert not differing, "\n".join(differing)
