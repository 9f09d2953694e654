"""A later stage without a checkpoint is refused: each shipped run that continues another, and no command of a page."""

import re
import shlex
from pathlib import Path

import pytest

from tests.fixtures import compose_config
from vlm.checks.start import check_start, start_problem
from vlm.config.packaged import read_run_description, run_names
from vlm.train.parts import connector_source

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^|(?:-m|--module) )vlm (?:(?:submit|launch) .*?)?-cn ")

STARTS = ("model=", "trainer.from_pretrained=", "trainer.starts_from=")
"""Overrides that give a run something to start from, or say that it needs nothing."""


def commands() -> list[tuple[str, str]]:
    """Page and command line of every run that a page starts or hands in."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += [(page.name, line) for line in block.replace("\\\n", " ").splitlines() if COMMAND.search(line)]
    return found


def test_a_later_stage_without_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"outputs/…/final of pretrain-smol, or trainer\.starts_from=null") as error:
        check_start(compose_config("finetune-smol", ["dataset.path=x"]), "finetune-smol")
    assert str(error.value).startswith("finetune-smol starts from a model that pretrain-smol trained, but ")


@pytest.mark.parametrize("word", ["trainer.from_pretrained=a/b", "trainer.starts_from=null", "model=qwen2.5-vl-3b"])
def test_a_checkpoint_a_whole_model_or_purpose_is_a_start(word: str):
    assert start_problem(compose_config("finetune-smol", ["dataset.path=x", word]), "finetune-smol") is None


@pytest.mark.parametrize("name", run_names())
def test_every_run_that_says_so_is_refused_without_its_start(name: str):
    config = compose_config(name, ["dataset.path=x"])
    says = re.search(r"\bStarts from\b", read_run_description(name)) is not None
    assert not says or start_problem(config, name) is not None
    assert config.trainer.starts_from in (None, *run_names())
    assert not name.startswith(("pretrain", "train")) or config.trainer.starts_from is None


@pytest.mark.parametrize(("page", "line"), commands(), ids=str)
def test_no_page_shows_a_command_that_is_refused(page: str, line: str):
    words = shlex.split(line.split("  #")[0])
    name = words[words.index("-cn") + 1]
    if name in run_names() and not any(word.startswith(STARTS) for word in words):
        assert start_problem(compose_config(name, ["dataset.path=x"]), name) is None


def test_the_table_of_parts_names_the_connector_that_is_built():
    names = {
        "mlp": [], "my_module:Own": ["model.connector.type=my_module:Own"], "linear": ["model/connector=linear"],
        "mine": ["model.connector.type=my_module:Own", "model.connector.name=mine"],
    }  # fmt: skip
    for name, words in names.items():
        connector = compose_config("pretrain-smol", ["dataset.path=x", *words]).model.connector
        assert connector_source(connector) == name
