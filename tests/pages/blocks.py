"""The fenced blocks of the pages, and the commands that stand in those for a shell."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
        for path in ROOT.glob(pattern)
        if path.name != "CHANGELOG.md"
    )
)
SHELLS = ("sh", "bash", "shell", "console")
LANGUAGES = (*SHELLS, "python", "yaml", "json", "jsonl", "csv", "html", "text", "")
"""What may stand behind the three backticks of a block; the last one is for what programs print."""
OPERATORS = ("&&", "||", ";", "|", "&", ">", ">>", "<")
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, the line at which its text begins, what stands behind the backticks, and the text."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a page: where it stands, the variables set before it, and its words."""

    page: str
    line: int
    environment: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


@cache
def read_page(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def read_blocks(page: str) -> tuple[Block, ...]:
    """Return the fenced blocks of a page.

    Raises:
        ValueError: a block does not end.
    """
    blocks: list[Block] = []
    fence, begun, language, lines = "", 0, "", list[str]()
    for number, line in enumerate(read_page(page).splitlines(), start=1):
        opening = re.fullmatch(r" *(`{3,})([\w+-]*)[^`]*", line)
        if not fence and opening:
            fence, language, begun, lines = opening[1], opening[2], number + 1, []
        elif fence and line.strip() == fence:
            blocks.append(Block(page, begun, language, "\n".join(lines) + "\n"))
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        raise ValueError(f"{page}:{begun}: the block does not end")
    return tuple(blocks)


def read_commands(page: str) -> list[Command]:
    """Return the commands of a page's blocks for a shell, in order.

    Raises:
        ValueError: a line is no command of words alone: joined commands, pipes and substitutions are not read.
    """
    return [
        command for block in read_blocks(page) if block.language in SHELLS for command in read_block_commands(block)
    ]


def read_block_commands(block: Block) -> list[Command]:
    """Return the commands of a block for a shell; see `read_commands`."""
    commands = []
    lines = block.text.split("\n")
    number = 0
    while number < len(lines):
        begun, text = number, lines[number]
        while text.endswith("\\") and number + 1 < len(lines):
            number += 1
            text = text[:-1] + lines[number]
        number += 1
        if text.strip():
            commands += _read_line(text, block.page, block.line + begun)
    return commands


def _read_line(text: str, page: str, line: int) -> list[Command]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise ValueError(f"{page}:{line}: {error}: {text}") from error
    if odd := [word for word in words if word in OPERATORS or "$(" in word or word.endswith(";")]:
        raise ValueError(f"{page}:{line}: {odd[0]}: one command a line, of words alone: {text}")
    count = next((index for index, word in enumerate(words) if not ASSIGNMENT.match(word)), len(words))
    return [Command(page, line, tuple(words[:count]), tuple(words[count:]))] if words[count:] else []


def read_spans(page: str) -> list[tuple[int, str]]:
    """Return what stands between single backticks outside of blocks, with the number of its line."""
    spans, fenced = [], False
    for number, line in enumerate(read_page(page).splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            spans += [(number, span) for span in SPAN.findall(line)]
    return spans


def read_files(page: str) -> dict[str, str]:
    """Return the files that a page shows whole: blocks whose first line is a comment of nothing but the file's name."""
    found = {}
    for block in read_blocks(page):
        if name := re.match(r"# ([\w./-]+\.(?:py|ya?ml))\n", block.text):
            found[name[1]] = block.text
    return found
