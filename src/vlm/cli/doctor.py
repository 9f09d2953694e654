"""`vlm doctor`: what is installed here, what is missing and for what: Markdown for a bug report, or JSON.

The facts are found in `doctor_facts`. Secrets and the home folder are masked.
"""

import argparse
import json
from collections.abc import Sequence

from vlm.cli.doctor_facts import Section, find_facts
from vlm.config.shown import PresentableParser, presentable


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm doctor`."""
    purpose = (
        "Show what is installed, what is missing, and what that is needed for. Paste the output into a bug report."
    )
    examples = ("vlm doctor", "vlm doctor --json > doctor.json", "vlm doctor --offline")
    parser = PresentableParser("vlm doctor", "vlm doctor [options]", purpose, examples=examples)
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--offline", action="store_true", help="do not ask whether the Hub can be reached")
    return parser


def main(words: Sequence[str]) -> None:
    """Print the facts."""
    args = make_parser().parse_args(words)
    sections = find_facts(offline=args.offline)
    if args.json:
        print(json.dumps({section.title: _mask_rows(section) for section in sections}, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(map(as_markdown, sections)))


def _mask_rows(section: Section) -> dict[str, str]:
    return {name: presentable(value) for name, value in section.rows}


def as_markdown(section: Section) -> str:
    """Return a section as a Markdown list below its heading."""
    rows = [f"- {name}: {value}" for name, value in _mask_rows(section).items()]
    return "\n".join([f"### {section.title}", "", *rows])
