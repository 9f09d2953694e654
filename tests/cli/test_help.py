"""The help of every command: one style, with examples that the command takes."""

import re
import shlex
import sys
from importlib import import_module

import pytest

from vlm.cli.main import COMMANDS, main
from vlm.cli.overview import format_entry, overview
from vlm.config.shown import PresentableParser, explain_arguments, wrap_command

OWN_HELP = ("data",)
"""Commands with tools below them, each with a parser of its own."""


def get_help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert not stopped.value.code
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in OWN_HELP])
def test_help_has_a_usage_of_one_line_a_purpose_and_examples(command: str, capsys: pytest.CaptureFixture[str]):
    """A new command gets them as arguments of `PresentableParser`: prog, usage, description and `examples`."""
    usage, purpose, *_ = (text := get_help(command, capsys)).split("\n\n")
    assert re.match(rf"usage: vlm {command}( |$)", usage)
    assert "\n" not in usage
    assert re.fullmatch(r"[A-Z].*\.", purpose, re.S), "a purpose is a sentence: Train …, Show …"
    examples = re.findall(r"^  (\S(?:.*\\\n)*.*)", text.partition("\nexamples:\n")[2], re.M)
    assert 1 <= len(examples) <= 3
    assert max(map(len, text.splitlines())) <= 130
    for example in examples:
        words = shlex.split(example.replace("\\\n", " ").partition(" > ")[0], comments=True)
        if words[0] == "eval":
            continue
        assert words[:2] == ["vlm", command]
        parser = import_module(f"vlm.cli.{COMMANDS[command]}").make_parser()
        own = words[2 : words.index("--")] if "--" in words else words[2:]
        parser.parse_known_args(own)


def test_every_option_says_what_it_does():
    for command in COMMANDS:
        if command not in OWN_HELP:
            parser = import_module(f"vlm.cli.{COMMANDS[command]}").make_parser()
            for action in parser._actions:
                name = "/".join(action.option_strings) or action.dest
                assert action.help, f"vlm {command} {name}"
                assert "_" not in name.partition("/")[0] or not action.option_strings, f"{name}: hyphens"


def test_two_columns_never_run_together():
    long = "preference-llava-onevision-of-somebody"
    assert format_entry(long, "text").splitlines() == [f"  {long}", f"{' ' * 32}text"]
    assert format_entry("name", "text") == f"  name{' ' * 26}text"
    rows = [line for line in overview().splitlines() if re.match(r"  \S", line)]
    assert len(rows) > 50
    assert [row for row in rows if not re.match(r"  \S.*?\S*( {2,}\S.*)?$", row) or len(row) > 120] == []


def test_the_help_of_a_run_begins_with_its_description(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as stopped:
        main(["-cn", "pretrain-llava", "--help"])
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert said.startswith("LLaVA-1.5's first stage (Liu et al. 2023, arXiv:2310.03744): only the connector")
    assert "\n  num_train_epochs: 1" in said
    assert "shell-completion" not in said  # `vlm completion` is ours


@pytest.mark.parametrize(("word", "said"), [("shwo", "no such tool. Did you mean show?"), ("xyz", "no such tool")])
def test_a_misspelled_tool_is_told_the_right_one(word: str, said: str):
    with pytest.raises(SystemExit) as stopped:
        main(["data", word])
    assert stopped.value.code == f"vlm data {word}: {said}"


def make_parser() -> PresentableParser:
    parser = PresentableParser("vlm thing", "vlm thing FILE [options]", "Do a thing.", examples=("vlm thing a.txt",))
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("words", nargs="*", metavar="inference.KEY=VALUE")
    parser.add_argument("--max-frames", type=int)
    parser.add_argument("--kind", choices=("one", "two"))
    return parser


REFUSED = {
    "": "FILE is missing",
    "a --max-frams 3": "--max-frams: no such option; did you mean --max-frames?",
    "a --max-frames": "--max-frames: a value is needed behind it",
    "a --max-frames x": "--max-frames x: a whole number is needed",
    "a --kind three": "--kind three: allowed are one, two",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_argparse_refuses_is_said_in_plain_words(line: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(line.split())
    assert capsys.readouterr().err == (
        f"vlm thing: {REFUSED[line]}\nusage: vlm thing FILE [options]\nvlm thing --help lists all options.\n"
    )


def test_options_may_be_spelled_with_underscores():
    assert make_parser().parse_args(["a_b", "--max_frames=3"]).max_frames == 3
    assert make_parser().parse_args(["a", "--max_frames", "4"]).max_frames == 4
    assert make_parser().parse_intermixed_args(["a", "--max_frames", "4", "x_y"]).words == ["x_y"]


def test_other_messages_stay_as_they_are():
    assert explain_arguments("give CHECKPOINT and OUT once each", []) == "give CHECKPOINT and OUT once each"
    assert explain_arguments("unrecognized arguments: b c", []) == "b: one word too many"


def test_a_long_example_is_one_command_for_a_shell():
    command = "vlm thing " + " ".join(f"--option-{number} value" for number in range(12))
    lines = wrap_command(command, 60)
    assert len(lines) > 1
    assert max(map(len, lines)) <= 62
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)
