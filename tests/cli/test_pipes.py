"""Output that nobody reads: commands end in silence, training runs go on."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

import pytest

from tests.cli.test_main import raise_value_error
from vlm.cli.main import main
from vlm.cli.train import train
from vlm.config.schema import RunConfig


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
    monkeypatch.setattr("vlm.cli.train.main", lambda words, **_: train(RunConfig(), "name", words))
    with closed_pipe() as stream, redirect_stderr(stream):
        main(["-cn", "name"])
    assert steps == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_an_error_is_told_though_nobody_reads_the_output(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlm.cli.export_checkpoint.main", raise_value_error)
    with closed_pipe(), pytest.raises(SystemExit, match=r"^vlm export: torn file$"):
        main(["export"])
