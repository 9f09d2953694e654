"""Every command in every page is understood by what it is typed for; nothing that no checker knows passes.

Commands are not run here: `test_running.py` does that with those that tiny parts and generated records suffice for.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages.blocks import LANGUAGES, PAGES, SHELLS, Block, read_block_commands, read_blocks, read_commands
from tests.pages.checks import MisunderstoodError, check_command
from tests.pages.place import Place
from tests.tiny_parts import Parts

HIDDEN = re.compile(r"^(?:\$ )?(?:vlm|deepspeed|torchrun|make|python -m) [a-z-]", re.MULTILINE)
"""A command where none is looked for."""


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete composed checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = parts.model("clip", "llama", template="chatml")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A folder to type commands in; code of the pages' own is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield Place(tmp_path, checkpoint)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page: str, place: Place):
    place.write_files(page)
    refused = []
    for command in read_commands(page):
        try:
            check_command(command, place)
        except MisunderstoodError as error:
            refused.append(str(error))
    assert not refused, "\n\n".join(refused)


@pytest.mark.parametrize("page", PAGES)
def test_no_command_stands_where_none_is_looked_for(page: str):
    for block in read_blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: ```{block.language}"
        if block.language not in SHELLS:
            assert HIDDEN.search(block.text) is None, f"{page}:{block.line}: mark the block as ```sh"


WRONG = {
    "vlm generate outputs/final --imagine cat.png": "--imagine: no such option",
    "vlm generate outputs/final -cn finetune-smol inference.temprature=1": "temprature",
    "vlm average outputs/a/final": "--out is missing",
    "vlm data clear train.json": "no such tool",
    "vlm -cn pretrain-smoll dataset.path=train.json": "no such run",
    "vlm -cn pretrain-smol": "dataset.path: a value is needed",
    "vlm -cn pretrain-smol dataset.path=train.json trainer.learning_rat=1": "trainer.learning_rat: no such key",
    "vlm -cn head-binary dataset.path=train.json trainer.learning_rate.head_learning_rate=-1": "a positive number",
    "vlm -cn pretrain-smol dataset.path=train.json model/connector=mpl": "mpl",
    "vlm data show -cn pretrain-smol --numbers 3 dataset.path=train.json": "--numbers",
    "vlm submit -cn pretrain-smol nodes=2 dataset.pth=train.json": "dataset.pth",
    "vlm launch --nprocs 8 -- -cn pretrain-smol dataset.path=train.json": "--nprocs",
    "vlm launch --nproc 8 -- -cn pretrain-smol dataset.pth=train.json": "dataset.pth",
    "deepspeed --gpus 8 --module vlm -cn pretrain-smol dataset.path=train.json": "deepspeed",
    "deepspeed --module vlm -cn pretrain-smol dataset.pth=train.json": "dataset.pth",
    "torchrun --procs 8 -m vlm -cn pretrain-smol dataset.path=train.json": "torchrun",
    "python -m vlm -cn pretrain-smol dataset.pth=train.json": "dataset.pth",
    "python -m benchmarks.finetuning": "there is no module",
    "python examples/make_datum.py": "there is no file",
    "python examples/make_data.py --pars": "--pars",
    "make testing": "no target testing",
    "make install PYTHONS=python3": "no variable PYTHONS",
    "pip install 'small-vlm[webb]'": "webb",
    "pip install torch": "torch",
    "hf auth lgin": "lgin",
    "curl http://127.0.0.1:8000/v1/klassify": "not an address",
    "vllm serve final --enable-lorra": "--enable-lorra",
    "docker build -t small-vlm --build-arg BASIS=x .": "no argument BASIS",
    "docker run --rm small-vlm vlm mdels": "mdels",
    "frobnicate the model": "no checker understands frobnicate",
}
"""A command -> words of what is said against it."""


@pytest.mark.parametrize(("line", "message"), WRONG.items(), ids=str)
def test_a_wrong_command_is_found(line: str, message: str, place: Place):
    place.provide(["dataset.path=train.json"])
    (command,) = read_block_commands(Block("page.md", 1, "sh", line))
    with pytest.raises(MisunderstoodError, match=re.escape(message)):
        check_command(command, place)


@pytest.mark.parametrize("line", ["vlm models | head", "vlm models && vlm chat x", "vlm chat $(pwd)", "echo 'x"])
def test_a_line_of_more_than_words_is_refused(line: str):
    with pytest.raises(ValueError, match=r"^page\.md:1: "):
        read_block_commands(Block("page.md", 1, "sh", line))
