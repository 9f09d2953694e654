"""The console script: the overview, the version and the names of the package."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

import pytest

import vlm
from vlm.cli.main import COMMANDS, main
from vlm.cli.train import train
from vlm.config.packaged import group_names, packaged_names, run_names
from vlm.config.schema import RunConfig


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_the_overview_lists_what_there_is(capsys: pytest.CaptureFixture[str], words: list[str]):
    main(words)
    printed = capsys.readouterr().out
    wanted = [*run_names(), *group_names(), *(f"vlm {name}" for name in COMMANDS), "--config-dir", "--cfg job"]
    wanted += [option for group in group_names() for option in packaged_names("vlm.config", group, ".yaml")]
    assert [text for text in wanted if text not in printed] == []
    assert max(map(len, printed.splitlines())) <= 120


def test_version(capsys: pytest.CaptureFixture[str]):
    main(["--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_public_names_load_when_asked_for():
    for name in vlm.__all__:
        assert getattr(vlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vlm.nothing


@contextmanager
def closed_pipe() -> Iterator[TextIO]:
    """Standard output is a pipe that nobody reads any more, as behind `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, redirect_stdout(stream):
        yield stream


def print_and_mend_errors(words: list[str]) -> None:
    """A command that says what the system refuses it in words of its own."""
    try:
        print("line\n" * 100_000)
    except OSError as error:
        sys.exit(f"vlm {words}: {error}")


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["data", "--help"], ["models", "--help"], ["data", "show"]]
)
def test_output_that_nobody_reads_ends_a_command_in_silence(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if words[-1] == "show":
        monkeypatch.setattr("vlm.cli.data.main", print_and_mend_errors)
    with closed_pipe() as stream, pytest.raises(SystemExit) as stopped:
        main(words)
    assert stream.closed  # what was still buffered went to nobody
    assert stopped.value.code in (141, 0)  # 0: argparse's own exit
    assert capsys.readouterr() == ("", "")


def test_a_run_goes_on_though_nobody_reads_its_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    steps: list[int] = []

    def run(*_: object) -> None:
        for step in range(3):
            print("loss\n" * 100_000)
            print("loss\n" * 100_000, file=sys.stderr, flush=True)
            steps.append(step)

    monkeypatch.setattr("vlm.train.run.run", run)
    monkeypatch.setattr("vlm.cli.train.main", lambda words: train(RunConfig(), "name", words))
    with closed_pipe() as stream, redirect_stderr(stream):
        main(["-cn", "name"])
    assert steps == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_an_error_is_told_though_nobody_reads_the_output(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlm.cli.export_checkpoint.main", raise_value_error)
    with closed_pipe(), pytest.raises(SystemExit, match=r"^vlm export: torn file$"):
        main(["export"])


def raise_value_error(words: list[str]) -> None:
    raise ValueError("torn file")


def test_what_a_command_refuses_ends_it_with_a_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlm.cli.export_checkpoint.main", raise_value_error)
    with pytest.raises(SystemExit, match=r"^vlm export: torn file$"):
        main(["export"])


def test_errors_of_commands_with_messages_of_their_own_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlm.cli.data.main", raise_value_error)
    with pytest.raises(ValueError, match="torn file"):
        main(["data", "show"])
