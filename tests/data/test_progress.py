"""Progress of long work: nothing of short work, and lines of the log where there is no terminal."""

import logging

import pytest

from vlm.data import progress
from vlm.data.progress import show_progress


def test_short_work_says_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]):
    with caplog.at_level(logging.INFO):
        assert list(show_progress(range(3), "counting")) == [0, 1, 2]
    assert caplog.text == ""
    assert capsys.readouterr() == ("", "")


def test_long_work_writes_lines_to_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO), show_progress((), "reading", 10, initial=4, unit="batch") as bar:
        bar.update(2)
        bar.update(4)
    lines = [record.message for record in caplog.records]
    assert any(line.startswith("reading: 6 of 10 batches, ") for line in lines)
    assert all(line and "\r" not in line for line in lines)


def test_a_terminal_has_a_bar_that_is_gone_in_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "shows_bars", lambda: True)
    assert list(show_progress(range(3), "counting", unit="record")) == [0, 1, 2]
    drawn = capsys.readouterr().err
    assert "counting" in drawn
    assert "\n" not in drawn
    assert list(show_progress(range(3), "counting", silent=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
