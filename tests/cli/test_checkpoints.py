"""The command lines of `vlm import` and `vlm export`, and those that the page tells people to type."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import refusal
from vlm.cli import export_checkpoint, import_checkpoint
from vlm.cli.export_checkpoint import FORMAT_DESCRIPTIONS
from vlm.hub.targets import EXPORT_FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
PARSERS = {"import": import_checkpoint.make_parser, "export": export_checkpoint.make_parser}


@pytest.mark.parametrize("line", LINES)
def test_the_pages_commands_are_understood(line: str):
    program, command, *words = shlex.split(line)
    assert program == "vlm"
    PARSERS[command]().parse_args(words)


def test_every_form_is_named():
    assert list(FORMAT_DESCRIPTIONS) == [*EXPORT_FORMATS, "gguf", "onnx"]
    assert all(f"--format {name}" in PAGE for name in FORMAT_DESCRIPTIONS)


def test_help_needs_no_torch():
    code = (
        "import sys, vlm.cli.main\n"
        "try: vlm.cli.main.main(['export', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(name in done.stdout for name in FORMAT_DESCRIPTIONS)


@pytest.mark.parametrize("command", PARSERS)
def test_usage_errors_end_with_2(command: str, capsys: pytest.CaptureFixture[str]):
    assert refusal(command) == "2"
    assert f"usage: vlm {command}" in capsys.readouterr().err


def test_an_export_needs_a_folder_unless_it_only_checks():
    check = export_checkpoint.make_parser().parse_args(["a/final", "--check", "--format", "llava"])
    assert (check.checkpoint, check.out, check.check) == ("a/final", None, True)
    with pytest.raises(ValueError, match="OUT is missing: the folder to create; only --check needs none"):
        export_checkpoint.main(["a/final", "--format", "llava"])
