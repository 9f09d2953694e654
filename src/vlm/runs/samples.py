"""Reads the answers of a model during training from `samples.md`."""

import re
from dataclasses import dataclass
from pathlib import Path

from vlm.runs.files import Folder, is_inside

SAMPLES_FILE = "samples.md"
STEP_HEADING = re.compile(r"^## Step (\d+)$", re.MULTILINE)
"""The heading of the answers at a step."""
_IMAGE = re.compile(r"!\[sample \d+\]\((samples/[\d-]+\.png)\)")
_TEXT = re.compile(r"- \*\*(question|reference|answer)\*\*: ?(.*)")


@dataclass
class Answer:
    """A sample and the model's answer; `image` is a file of the run directory."""

    question: str = ""
    reference: str = ""
    answer: str = ""
    image: Path | None = None


def read_samples(folder: Folder) -> dict[int, list[Answer]]:
    """Return step -> its answers, in the order of the file; of a repeated step, the last answers count."""
    text = folder.text(SAMPLES_FILE)
    headings = list(STEP_HEADING.finditer(text))
    ends = [*(heading.start() for heading in headings), len(text)][1:]
    return {
        int(heading[1]): _parse_answers(text[heading.end() : end], folder.path)
        for heading, end in zip(headings, ends, strict=True)
    }


def _parse_answers(text: str, folder: Path) -> list[Answer]:
    answers: list[Answer] = []
    image: Path | None = None
    for line in text.splitlines():
        if match := _IMAGE.fullmatch(line):
            image = folder / match[1] if is_inside(folder / match[1], folder) else None
        elif match := _TEXT.match(line):
            if match[1] == "question":
                answers.append(Answer(image=image))
                image = None
            if answers:
                setattr(answers[-1], match[1], match[2])
    return answers
