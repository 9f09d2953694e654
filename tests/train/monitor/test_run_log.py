"""`run.log`: what goes to it, what the terminal still shows, and what is left of a run that died."""

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlm.train.monitor.run_log import IN_PLACE, RunLog

OWN = logging.getLogger("vlm.tests.run_log")
LIBRARY = logging.getLogger("a_library.of.others")


class Console(io.StringIO):
    name = "<stdout>"


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    """Where the console handler of this package prints, as Hydra sets it up."""
    stream, package = Console(), logging.getLogger("vlm")
    monkeypatch.setattr(package, "handlers", [logging.StreamHandler(stream)])
    level = package.level
    package.setLevel(logging.INFO)
    yield stream
    package.setLevel(level)


def fail_within(folder: Path | None, error: BaseException) -> None:
    """A run that logs a library's warning, and raises an error."""
    with RunLog(rank=0) as log:
        if folder is not None:
            log.open(folder)
        LIBRARY.warning("a worry")
        raise error


def test_the_file_has_everything_and_the_console_our_own(
    tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
):
    with RunLog(rank=0) as log:
        OWN.info("before the folder is known")
        LIBRARY.warning("chatter %d", 1)
        log.open(tmp_path / "run")
        OWN.info("a note")
        OWN.warning("a worry")
        OWN.info("shown in place", extra={IN_PLACE: True})
        warnings.warn("of Python", UserWarning, stacklevel=1)
        LIBRARY.error("a real error")
    text = (tmp_path / "run" / "run.log").read_text()
    for line in ("before the folder is known", "chatter 1", "a note", "a worry", "shown in place", "of Python",
                 "a real error"):  # fmt: skip
        assert line in text
    assert next(line for line in text.splitlines() if "chatter" in line)[:4].isdigit(), "lines have the time"
    assert console.getvalue().splitlines() == ["before the folder is known", "a note", "warning: a worry"]
    assert capsys.readouterr().err == "[ERROR] a_library.of.others: a real error\n"


def test_a_traceback_is_in_the_file(tmp_path: Path, console: Console):
    with pytest.raises(KeyError):
        fail_within(tmp_path, KeyError("lost"))
    text = (tmp_path / "run.log").read_text()
    assert "Traceback" in text
    assert "KeyError: 'lost'" in text
    assert "lost" not in console.getvalue(), "the process prints it once, as always"


def test_a_run_that_is_asked_to_stop_has_no_traceback(tmp_path: Path):
    with pytest.raises(SystemExit):
        fail_within(tmp_path, SystemExit(75))
    assert "Traceback" not in (tmp_path / "run.log").read_text()


def test_a_library_that_prints_by_itself_is_taken_over_and_given_back(tmp_path: Path, console: Console):
    talker = logging.getLogger("talker")
    talker.propagate = False
    with RunLog(rank=0) as log:
        handler = logging.StreamHandler(console)  # as one that is imported now
        talker.addHandler(handler)
        log.open(tmp_path)
        talker.warning("says the talker")
        assert talker.handlers == []
    assert talker.handlers == [handler]
    assert not talker.propagate
    talker.removeHandler(handler)
    assert "says the talker" in (tmp_path / "run.log").read_text()
    assert console.getvalue() == ""


def test_other_ranks_have_a_file_where_they_have_something_to_say(tmp_path: Path):
    with RunLog(rank=1) as log:
        log.open(tmp_path)
        OWN.info("a note")
    assert list(tmp_path.iterdir()) == []
    with RunLog(rank=1) as log:
        log.open(tmp_path)
        LIBRARY.warning("a worry")
    assert "a worry" in (tmp_path / "run.log.rank1").read_text()


def test_a_later_start_adds_to_the_file(tmp_path: Path):
    for word in ("first", "second"):
        with RunLog(rank=0) as log:
            log.open(tmp_path)
            LIBRARY.warning(word)
    assert [word in (tmp_path / "run.log").read_text() for word in ("first", "second")] == [True, True]


def test_warnings_are_shown_where_no_folder_was_opened(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="refused"):
        fail_within(None, ValueError("refused"))
    assert "[WARNING] a_library.of.others: a worry" in capsys.readouterr().err


def test_loggers_are_as_before(tmp_path: Path, console: Console):
    root, package = logging.getLogger(), logging.getLogger("vlm")
    before = list(root.handlers), list(package.handlers), warnings.showwarning
    with RunLog(rank=0) as log:
        log.open(tmp_path)
    assert (list(root.handlers), list(package.handlers), warnings.showwarning) == before
