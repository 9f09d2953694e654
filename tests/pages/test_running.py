"""The commands of pages run, in order, as they are typed; see `tests/pages/stage.py` for what stands in for what."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.server import LocalHub
from tests.pages.blocks import read_blocks, read_commands
from tests.pages.stage import TOKEN, Stage, reason_to_skip, write_base

TUTORIAL = "docs/tutorial.md"
PAGES_THAT_RUN = (
    "README.md", "docs/data.md", "docs/evaluation.md", "docs/heads.md", "docs/inference.md", "docs/lora.md",
    "docs/preference.md", "docs/publishing.md", "docs/supervised.md",
)  # fmt: skip
"""Pages whose commands run on small parts. Those of examples/README.md run in tests/test_examples.py, the files of
docs/extending.md in tests/test_extending.py; other pages name recipes and models of the Hub, or repeat these."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small parts and a small checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    """A Hub that `ann` may write to."""
    hub = LocalHub()
    hub.accounts = {TOKEN: {"name": "ann", "orgs": [], "role": "write"}}
    with hub.running():
        yield hub


@pytest.fixture
def stage(base: Path, hub: LocalHub, tmp_path: Path) -> Stage:
    """An empty place for a page."""
    return Stage(tmp_path, base, hub)


def write_files(page: str, folder: Path) -> None:
    """Write the code and the runs that a page shows whole."""
    for block in read_blocks(page):
        if name := re.match(r"# ([\w./-]+\.(?:py|ya?ml))\n", block.text):
            (folder / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / name[1]).write_text(block.text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_the_commands_of_a_page_run(page: str, stage: Stage):
    write_files(page, stage.folder)
    failed = []
    for command in read_commands(page):
        if reason_to_skip(command) is None:
            done = stage.run(command)
            if done.returncode != 0:
                failed.append(f"{command}\nended with {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
def test_the_tutorial_runs_from_photos_to_a_published_model(stage: Stage):
    """Its commands run one after the other with its own data; then plain transformers loads what was pushed."""
    write_files(TUTORIAL, stage.folder)
    for command in read_commands(TUTORIAL):
        if reason_to_skip(command) is None:
            done = stage.run(command)
            assert done.returncode == 0, f"{command}\n{(done.stdout + done.stderr)[-3000:]}"
    (code,) = [block.text for block in read_blocks(TUTORIAL) if "from transformers import" in block.text]
    program = "import sys\nsys.modules['vlm'] = None\n" + code.replace('"me/', '"ann/')
    done = stage.run_alone(["-c", program])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_most_commands_of_the_readme_run():
    commands = read_commands("README.md")
    skipped = [command for command in commands if reason_to_skip(command) is not None]
    assert len(skipped) < 0.7 * len(commands), "\n".join(f"{command}: {reason_to_skip(command)}" for command in skipped)
