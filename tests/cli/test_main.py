"""The console script: the overview, the version and the names of the package."""

import os
import re
import sys

import pytest

import vlm
from vlm.cli.main import COMMANDS, main
from vlm.config.packaged import group_names, packaged_names, run_names


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


def test_a_command_takes_the_rank_that_deepspeeds_launcher_puts_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LOCAL_RANK", "0")  # so that the environment is put back
    main(["--local_rank=1", "--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_public_names_load_when_asked_for():
    for name in vlm.__all__:
        assert getattr(vlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vlm.nothing


def test_a_plot_needs_no_backend_of_the_process_that_started_it(monkeypatch: pytest.MonkeyPatch):
    """Jupyter's kernel names one to its commands; matplotlib raises on import where that is not installed."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.nowhere")
    monkeypatch.setattr(sys, "argv", ["vlm", "--version"])
    monkeypatch.setattr("vlm.cli.main.hush_leak_reports", lambda: None)
    main()
    assert os.environ["MPLBACKEND"] == "agg"


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


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm.cli.export_checkpoint.main", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["export"])
    assert capsys.readouterr().err == "\nvlm export: stopped\n"
