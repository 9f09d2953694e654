"""A question about an image that a run's own records ask, for the commands that the run suggests at its end."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm.data.dataset import SampleDataset
from vlm.data.records.positions import value_or_bad_sample
from vlm.data.sample import PLACEHOLDER, VIDEO_PLACEHOLDER, BadSample, ImageRef, Sample
from vlm.data.stream import SampleStream
from vlm.runs.files import Folder
from vlm.runs.samples import read_samples

MAX_LENGTH = 80
"""The longest question that a suggested command shows, in characters."""
MAX_RECORDS = 100
"""Number of records of each data set that are searched for a question."""


@dataclass(frozen=True)
class ExampleQuestion:
    """A question about an image.

    Attributes:
        image: an image file; `FILE` if the run has none.
        prompt: the question; None if no record has a short one about one image.
    """

    image: str = "FILE"
    prompt: str | None = None


def find_example_question(records: Mapping[str, SampleDataset | SampleStream], folder: Path) -> ExampleQuestion:
    """Return a short question about one image: of a held-out record, or else of a training record.

    If no record has one with an image file of its own, it is taken from the answers in `samples.md`.

    Args:
        records: the run's data sets by their role.
        folder: the run directory.
    """
    found = (question for role in ("eval", "train") for question in _questions_of(records.get(role)))
    return next(found, None) or _answered_question(folder)


def _questions_of(records: SampleDataset | SampleStream | None) -> Iterator[ExampleQuestion]:
    if isinstance(records, SampleDataset):  # a stream would have to be opened again
        for index in range(min(MAX_RECORDS, len(records))):
            sample = value_or_bad_sample(records.sample, index)
            if not isinstance(sample, BadSample) and (question := _question_of(sample)) is not None:
                yield question


def _question_of(sample: Sample) -> ExampleQuestion | None:
    """Return a sample's first question; None if a command line cannot ask it like this."""
    if len(sample.media) != 1 or sample.objects:  # marks stand for objects in its texts
        return None
    image, turn = sample.media[0], next((turn for turn in sample.turns if turn.role == "user"), None)
    if turn is None or image not in turn.content:
        return None
    if not isinstance(image, ImageRef) or image.path is None or image.content is not None or image.frame is not None:
        return None
    texts = [part.strip() for part in turn.content if isinstance(part, str)]
    if len(texts) != 1 or not _is_short(texts[0]):
        return None
    return ExampleQuestion(str(image.path), texts[0])


def _answered_question(folder: Path) -> ExampleQuestion:
    """Return a short question that the model was asked while it trained, or at least an image that it was shown."""
    answers = [answer for answers in read_samples(Folder(folder)).values() for answer in answers if answer.image]
    questions = (ExampleQuestion(str(one.image), one.question) for one in answers if _is_short(one.question))
    images = (ExampleQuestion(str(answer.image)) for answer in answers)
    return next(questions, None) or next(images, ExampleQuestion())


def _is_short(text: str) -> bool:
    has_mark = PLACEHOLDER in text or VIDEO_PLACEHOLDER in text
    return 0 < len(text) <= MAX_LENGTH and text.isprintable() and not has_mark
