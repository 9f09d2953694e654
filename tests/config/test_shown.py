"""What others wrote is shown bounded and visible: a terminal obeys none of it."""

import logging
import sys

import pytest

from vlm.config.shown import PresentableParser, PresentableRecord, presentable, print_traceback, printable, shorten

CONTROLS = {
    "\x1b[31mred": r"\x1b[31mred",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x9b31m": r"\x9b31m",
    "a\rb": r"a\rb",
    "a\x08b": r"a\x08b",
    "a\u202egnp.exe": r"a\u202egnp.exe",
    "\u2066x\u2069": r"\u2066x\u2069",
    "a\u2028b": r"a\u2028b",
    "zero\u200bwidth": r"zero\u200bwidth",
    "\U000e0041tag": r"\U000e0041tag",
    "half \ud83d": r"half \ud83d",
    "\0": r"\x00",
}


@pytest.mark.parametrize(("text", "shown"), CONTROLS.items(), ids=CONTROLS.values())
def test_control_characters_are_written_out(text: str, shown: str):
    assert printable(text) == shown
    printable(text).encode()


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "two\nlines\twith a tab",
        "é 漢字 שלום",
        "👩\u200d👩\u200d👧",
        "می\u200cخواهم",
        "🏴\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f",
        "",
    ],
)
def test_letters_of_every_script_stay(text: str):
    assert printable(text) == text


def test_a_single_line_stays_one():
    assert printable("a\nb\tc", single_line=True) == r"a\nb\tc"


def test_a_parser_of_a_command_line_refuses_in_a_few_lines(capsys: pytest.CaptureFixture[str]):
    parser = PresentableParser("vlm")
    parser.add_argument("--number", type=int)
    for words in (["--number", "A" * 30_000], ["--\x1b[31mred"], [f"--token=hf_{'a' * 34}"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
    refusals = capsys.readouterr().err
    assert len(refusals) < 1000
    assert refusals.replace("\n", "").isprintable()
    assert "hf_a" not in refusals


def test_what_is_long_is_cut_in_the_middle():
    assert shorten(f"key={'A' * 33_000}: a number is needed") == (
        f"key={'A' * 76}…[33,005 characters]…{'A' * 29}:" + " a number is needed"
    )
    assert shorten("a short one") == "a short one"


@pytest.mark.parametrize("text", ["x" * 10**6, "x " * 10**6, "x\n" * 10**6, "|" * 10**6, "\x1b" * 10**6, "\n" * 10**6])
def test_any_message_has_a_few_lines(text: str):
    shown = presentable(f"key={text}: a number is needed")
    assert len(shown) < 8_000
    assert shown.count("\n") <= 70
    assert shown.startswith("key=")
    assert shown.endswith(": a number is needed")


def test_log_lines_are_presentable():
    record = PresentableRecord("vlm", logging.INFO, "", 0, "%s: hub_token=%s", ("a\x1bb", "abc"), None)
    assert record.getMessage() == r"a\x1bb: hub_token=***"


def test_so_are_tracebacks(capsys: pytest.CaptureFixture[str]):
    try:
        raise KeyError("hub_token=abc \x1b[2J")
    except KeyError:
        kind, error, trace = sys.exc_info()
        assert kind is not None
        assert error is not None
        print_traceback(kind, error, trace)
    said = capsys.readouterr().err
    assert "test_shown.py" in said
    assert "\x1b" not in said
    assert "=abc \\x1b" not in said.splitlines()[-1]
