"""What an evaluation wrote: its metrics with intervals, and the records with the worst answers.

Needs neither torch nor Gradio. Files are read within bounds; nothing raises for their content.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain
from pathlib import Path

from vlm.runs.evaluations import Evaluation, read_scores
from vlm.runs.files import Folder, JsonObject, is_inside, list_at, number_at, text_at

RESULTS_FILE, ANSWERS_FILE = "results.json", "answers.jsonl"
RESULT_PATTERNS = ("eval/*", "*/eval/*", "*/*/eval/*")
"""Where evaluations lie below the folder of outputs."""
MAX_LISTED = 200
"""The largest number of evaluations that are listed."""
MAX_COMPARED_CHARACTERS = 500
"""How much of an answer and of a reference is compared."""


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer next to its references; `similarity` to the nearest one is from 0 to 1, and 0 if it has none."""

    source: str
    image: Path | None
    question: str
    references: list[str]
    answer: str
    error: str
    similarity: float


def find_results(outputs: Path) -> list[str]:
    """Return the folders with results below the folder of outputs, relative to it, the newest first."""
    folders = chain.from_iterable(outputs.glob(pattern) for pattern in RESULT_PATTERNS)
    files = [folder / RESULTS_FILE for folder in folders if (folder / RESULTS_FILE).is_file()]
    files = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[:MAX_LISTED]
    return [file.parent.relative_to(outputs).as_posix() for file in files]


def read_results(outputs: Path, name: str | None) -> Evaluation | None:
    """Return the results of a name that `find_results` gave; None for any other, so that no other folder is read."""
    if name is None or name not in find_results(outputs) or not is_inside(outputs / name, outputs):
        return None
    results = Folder(outputs / name).json(RESULTS_FILE)
    return Evaluation(name, outputs / name, results, read_scores(results))


def worst_answers(folder: Path, most: int = 12) -> list[JudgedAnswer]:
    """Return the answers that are least like their references, the worst first; records that failed come last."""
    judged = list(map(_judge, Folder(folder).json_lines(ANSWERS_FILE)))
    answered = [answer for answer in judged if answer.references and not answer.error and answer.similarity < 1]
    failed = [answer for answer in judged if answer.error]
    return [*sorted(answered, key=lambda answer: answer.similarity), *failed][:most]


def left_out(results: JsonObject) -> Iterator[str]:
    """Yield sentences about the records that the metrics leave out."""
    yield from map(str, list_at(results, "left_out"))


def describe_results(results: JsonObject) -> str:
    """Return what was evaluated on what."""
    records = number_at(results, "records")
    counted = "" if records is None else f" ({records:,.0f} records)"
    return f"{text_at(results, 'checkpoint')} on {text_at(results, 'data')}{counted}"


def _judge(row: JsonObject) -> JudgedAnswer:
    references = [str(reference) for reference in list_at(row, "references")]
    answer, image = text_at(row, "answer"), text_at(row, "image_path").partition(";")[0]
    return JudgedAnswer(
        text_at(row, "source"),
        Path(image) if image else None,
        text_at(row, "prompt"),
        references,
        answer,
        text_at(row, "error"),
        _similarity(answer, references),
    )


def _similarity(answer: str, references: Sequence[str]) -> float:
    """Return the similarity of an answer to the nearest reference, ignoring case and a full stop at the end."""
    texts = [_plain(reference) for reference in references]
    return max((SequenceMatcher(None, _plain(answer), text).ratio() for text in texts), default=0.0)


def _plain(text: str) -> str:
    return text[:MAX_COMPARED_CHARACTERS].strip().removesuffix(".").casefold()
