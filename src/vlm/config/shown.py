"""Makes foreign texts safe to show in messages, logs and terminals: of limited length, visible, without secrets.

Imports its sibling `secrets` only. A text is changed only where it is shown, never where it is stored: files of answers
and records keep the original. Use `presentable` for whole messages and log lines, and `printable` for texts within
them, such as a model's answer.
"""

import argparse
import logging
import re
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from textwrap import wrap
from types import TracebackType
from typing import NoReturn

from vlm.config.secrets import mask

MAX_WORD_LENGTH = 300
"""The longest word (without a blank or `|`) that a message shows in full; paths and addresses are shorter."""
MAX_LINE_LENGTH = 1500
MAX_MESSAGE_LENGTH = 4000
MAX_LINES = 60
"""The longest line, the longest message and the largest number of lines that are shown in full."""

_SHOWN_ENDS = 80, 30
"""How many characters of the beginning and the end are shown of a text that is too long."""

_UNPRINTABLE = re.compile(
    "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f"  # stays: of Wales, for example
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters of C0 and C1, but tab and line feed
    "\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # directions, joins, nothing to see
    "\U000e0000-\U000e007f"  # tags: text that is not shown
    "\ud800-\udfff]"
)
"""Characters that a terminal obeys or hides instead of showing them, and halves of surrogate pairs."""

_WHITE_SPACE = re.compile("[\t\n]")


def printable(text: str, *, single_line: bool = False) -> str:
    r"""Return a text in which characters that a terminal obeys or hides are written as escapes, such as `\x1b`.

    Line feeds and tabs stay; with `single_line` they are escaped too, as in a file's name. Joiners within words and
    emoji (U+200C, U+200D) stay.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _UNPRINTABLE.sub(_escape, text)
    return _WHITE_SPACE.sub(_escape, text) if single_line else text


def _escape(match: re.Match[str]) -> str:
    if match[0][0] == "\U0001f3f4":
        return match[0]
    return repr(match[0])[1:-1] if match[0] < "\x80" else match[0].encode("unicode_escape").decode()


def shorten(text: str) -> str:
    """Return a message in which everything too long is cut in its middle, with a note of its length.

    A message first repeats the given value, then says what is allowed; so the text after a long value stays.
    """
    if len(text) <= MAX_WORD_LENGTH:
        return text
    text = re.sub(rf"[^\s|]{{{MAX_WORD_LENGTH + 1},}}", lambda word: _cut(word[0]), text)
    if len(text) <= MAX_LINE_LENGTH and text.count("\n") < MAX_LINES:
        return text
    lines = text.split("\n")
    if len(lines) > MAX_LINES:
        left_out = f"… {len(lines) - MAX_LINES:,} lines are left out …"
        lines = [*lines[: MAX_LINES // 2], left_out, *lines[-MAX_LINES // 2 :]]
    text = "\n".join(_cut(line, 300, 300) if len(line) > MAX_LINE_LENGTH else line for line in lines)
    return text if len(text) <= MAX_MESSAGE_LENGTH else _cut(text, MAX_MESSAGE_LENGTH // 2, MAX_MESSAGE_LENGTH // 3)


def _cut(text: str, first: int = _SHOWN_ENDS[0], last: int = _SHOWN_ENDS[1]) -> str:
    return f"{text[:first]}…[{len(text):,} characters]…{text[-last:]}"


def presentable(message: object) -> str:
    """Return a message for a terminal, a log or the page: shortened, printable, and without secrets."""
    return printable(shorten(mask(str(message))))


def format_columns(names: Sequence[str], width: int = 100) -> str:
    """Return names in columns, ordered downwards, with two blanks before each line."""
    cell = max(map(len, names), default=0) + 2
    num_rows = -(-len(names) // max(1, (width - 2) // cell))
    rows = (names[row::num_rows] for row in range(num_rows))
    return "\n".join("  " + "".join(f"{name:<{cell}}" for name in row).rstrip() for row in rows)


class PresentableRecord(logging.LogRecord):
    """A log record of any library, printable and without secrets; tables keep their lines and length."""

    def getMessage(self) -> str:  # noqa: N802 - the name that logging calls
        """Return the message that is logged."""
        return printable(mask(super().getMessage()))


class PresentableParser(argparse.ArgumentParser):
    """A command-line parser with examples in its help, whose errors are in plain words and without secrets.

    Args:
        prog: the command: `vlm generate`.
        usage: the command on one line, with `[options]` for optional ones; None: argparse's usage.
        description: what the command does.
        examples: command lines, shown below the options.
        epilog: text after the options; passed to argparse like all other keywords.
    """

    def __init__(
        self,
        prog: str,
        usage: str | None = None,
        description: str | None = None,
        *,
        examples: Sequence[str] = (),
        epilog: str | None = None,
        allow_abbrev: bool = True,
        formatter_class: type[argparse.HelpFormatter] = argparse.HelpFormatter,
    ):
        super().__init__(prog, usage, description, epilog, allow_abbrev=allow_abbrev, formatter_class=formatter_class)
        self.examples = tuple(examples)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse words as argparse does; options may be spelled with underscores, too."""
        words = [*map(_with_hyphens, sys.argv[1:] if args is None else args)]
        return super().parse_known_args(words, namespace or argparse.Namespace())

    def format_help(self) -> str:
        """Return the help, with the examples at its end."""
        listing = "".join(f"\n  {line}" for example in self.examples for line in wrap_command(example))
        return super().format_help() + (f"\nexamples:{listing}\n" if listing else "")

    def error(self, message: str) -> NoReturn:
        """Print the error and the usage, and end the process with status 2."""
        options = re.findall(r"--[\w-]+", super().format_help())
        said = presentable(explain_arguments(message, options))
        usage = f"\n{self.format_usage().strip()}" if self.usage else ""
        self.exit(2, f"{self.prog}: {said}{usage}\n{self.prog} --help lists all options.\n")


def _with_hyphens(word: str) -> str:
    """Return an option with hyphens in its name (`--max_frames=4` -> `--max-frames=4`); other words as they are."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if re.fullmatch(r"--\w[\w-]*", name) else word


NEEDED_ARGUMENTS = {
    "int": "a whole number is needed",
    "float": "a number is needed",
    "positive": "a whole number above 0 is needed",
}
"""Name of the function that parses a value -> what it needs."""


def explain_arguments(message: str, options: Sequence[str]) -> str:
    """Return argparse's error in plain words; `options` are the options of the command."""
    if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
        names = [name for name in missing[1].split(", ") if "=" not in name]
        return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} missing"
    if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message):
        word = unknown[1].split()[0]
        if not word.startswith("-"):
            return f"{word}: one word too many"
        near = get_close_matches(word.partition("=")[0].replace("_", "-"), options, n=1)
        return f"{word}: no such option{f'; did you mean {near[0]}?' if near else ''}"
    given = re.fullmatch(r"argument ([^:]*?): (.*)", message, re.S)
    if given is None:
        return message
    name, said = given[1].split("/")[0], given[2]
    if choice := re.fullmatch(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", said):
        return f"{name} {choice[1]}: allowed are {choice[2].replace(chr(39), '')}"
    if value := re.fullmatch(r"invalid (\w+) value: '(.*)'", said):
        needed = NEEDED_ARGUMENTS.get(value[1].strip("_"), "a value of another form is needed")
        return f"{name} {value[2]}: {needed}"
    return f"{name}: {'a value is needed behind it' if said == 'expected one argument' else said}"


def wrap_command(command: str, width: int = 108) -> list[str]:
    """Return a command line wrapped so that a shell still reads it as one command."""
    lines = wrap(command, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def present_what_is_printed() -> None:
    """Make all logs of this process, and unhandled tracebacks, printable and free of secrets."""
    logging.setLogRecordFactory(PresentableRecord)
    sys.excepthook = print_traceback


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an unhandled error's traceback like `sys.excepthook`, without secrets or control characters."""
    print(printable(mask("".join(traceback.format_exception(kind, error, trace)))), end="", file=sys.stderr)
