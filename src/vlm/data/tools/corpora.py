"""Conversions of published data sets: Conceptual Captions, COCO's captions, VQA. Generators, as `convert` takes them.

Imports msgspec, the standard library and siblings only.
"""

import mmap
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vlm.data.records.open import IMAGE_EXTENSIONS, value_or_bad_sample
from vlm.data.sample import BadSample
from vlm.data.tools.exports import Kind, convert_record, make_llava_record
from vlm.data.tools.table import FOLDER_SIZE, Table

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""LLaVA's instruction for VQAv2 (arXiv:2310.03744)."""


@dataclass(frozen=True)
class ConversionContext:
    """What every conversion may need.

    Attributes:
        folder: the image folder.
        cache: the cache's folder.
        left_out: counts what gives no record, and why.
    """

    folder: Path
    cache: Path
    left_out: Counter[str] = field(default_factory=Counter)


def conceptual_captions(
    source: str, context: ConversionContext, *, url_column: str | None = None, caption_column: str | None = None
) -> Iterator[Any]:
    """A table of captions and URLs, whose pictures `vlm data download` has put into the image folder.

    The table is read as it is there, with a header or without. Row 12, counted from 0 without the header, has the
    picture `00000/000000012.jpg`, or of another ending. Rows without one, or without a caption, are left out.

    Args:
        source: the table: `.tsv`, `.csv` or `.parquet`.
        context: of the conversion.
        url_column: the name of the column, or its number from 1 where there is no header; None: found out.
        caption_column: the same.

    Raises:
        ValueError: it is no such table.
    """
    number, names = -1, {}
    for row in Table(Path(source), url_column, caption_column).rows():
        if row.number // FOLDER_SIZE != number:
            number = row.number // FOLDER_SIZE
            names = _image_names_by_row(context.folder / f"{number:05d}")
        name = names.get(row.number)
        if name and row.caption:
            yield {"id": f"{row.number:09d}", "image": f"{number:05d}/{name}", "caption": row.caption}
        else:
            context.left_out["rows without a caption" if name else "rows without a picture"] += 1


def _image_names_by_row(folder: Path) -> dict[int, str]:
    """Row -> name of its picture, of one folder."""
    files = (
        [file for file in folder.iterdir() if file.suffix[1:].lower() in IMAGE_EXTENSIONS] if folder.is_dir() else []
    )
    return {int(file.stem): file.name for file in files if file.stem.isdecimal()}


class CocoImage(msgspec.Struct):
    """A picture of COCO's."""

    id: int | str
    file_name: str


class CocoCaption(msgspec.Struct):
    """A caption of COCO's."""

    image_id: int | str
    caption: str
    id: int | str | None = None


class CocoFile(msgspec.Struct):
    """COCO's file; annotations are read one by one."""

    images: list[CocoImage]
    annotations: list[msgspec.Raw]


def coco_captions(source: str, context: ConversionContext) -> Iterator[Any]:
    """COCO's `captions_*.json`: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    Each caption is a record. The names of all pictures and the places of all captions stay in memory, about 250 bytes
    for a picture and 80 for a caption; the file itself is mapped.
    """
    file = decode_json_file(Path(source), CocoFile)
    names = {image.id: image.file_name for image in file.images}

    def make_caption_record(annotation: msgspec.Raw) -> dict[str, Any]:
        found = convert_record(msgspec.json.decode(annotation), CocoCaption)
        sample_id = str(found.image_id if found.id is None else found.id)
        if found.image_id not in names:
            raise BadSample(sample_id, f"image_id={found.image_id} is none of `images`")
        return {"id": sample_id, "image": names[found.image_id], "caption": found.caption.strip()}

    for annotation in file.annotations:
        yield value_or_bad_sample(make_caption_record, annotation)


class VqaQuestion(msgspec.Struct):
    """A question about a picture."""

    question_id: int | str
    image_id: int | str
    question: str


class VqaText(msgspec.Struct):
    """One person's answer."""

    answer: str


class VqaAnnotation(msgspec.Struct):
    """What people answered."""

    question_id: int | str
    multiple_choice_answer: str | None = None
    answers: list[VqaText | str] | None = None


class VqaQuestions(msgspec.Struct):
    """The file of questions."""

    questions: list[VqaQuestion]


class VqaAnnotations(msgspec.Struct):
    """The file of answers; each is read by itself."""

    annotations: list[msgspec.Raw]


def vqa(
    source: str, context: ConversionContext, *, annotations: str, image_pattern: str, group: bool = True,
    instruction: str = SHORT_ANSWER,
) -> Iterator[Any]:  # fmt: skip
    """VQAv2's questions with their answers, by default all about one picture as one conversation.

    Questions `{"questions": [{"question_id", "image_id", "question"}]}` and annotations `{"annotations":
    [{"question_id", "multiple_choice_answer", "answers": [{"answer"}]}]}`, where the commonest of `answers` counts if
    there is no `multiple_choice_answer`. All are in memory, about 400 bytes a question.

    Args:
        source: the file of questions.
        context: of the conversion.
        annotations: the file of answers.
        image_pattern: name of a picture, with `{image_id}`.
        group: whether the questions about a picture become one record.
        instruction: a line after the first question of a record; empty: none.

    Raises:
        ValueError: a file is no such file, or the pattern none.
    """
    image_name = make_image_namer(image_pattern)
    answers = dict(_read_vqa_answers(Path(annotations)))
    groups: dict[Any, list[VqaQuestion]] = {}
    for question in decode_json_file(Path(source), VqaQuestions).questions:
        if question.question_id in answers:
            groups.setdefault(question.image_id if group else question.question_id, []).append(question)
        else:
            context.left_out["questions without an answer"] += 1

    def record(item: tuple[Any, list[VqaQuestion]]) -> dict[str, Any]:
        texts = [question.question for question in item[1]]
        if instruction:
            texts[0] = f"{texts[0]}\n{instruction}"
        asked = zip(texts, (answers[question.question_id] for question in item[1]), strict=True)
        return make_llava_record(str(item[0]), image_name(item[1][0].image_id), asked)

    for item in groups.items():
        yield value_or_bad_sample(record, item)


def _read_vqa_answers(file: Path) -> Iterator[tuple[int | str, str]]:
    """Question -> its answer."""
    for number, raw in enumerate(decode_json_file(file, VqaAnnotations).annotations, start=1):
        try:
            found = msgspec.json.decode(raw, type=VqaAnnotation)
        except msgspec.DecodeError as error:
            raise ValueError(f"--annotations {file}: annotation {number}: {error}") from None
        answers = Counter(one if isinstance(one, str) else one.answer for one in found.answers or [])
        if found.multiple_choice_answer is not None:
            yield found.question_id, found.multiple_choice_answer
        elif answers:
            yield found.question_id, answers.most_common(1)[0][0]


def make_image_namer(pattern: str) -> Callable[[int | str], str]:
    """What gives a picture's name by its number.

    Raises:
        ValueError: the pattern is none of `str.format` with the field `image_id`.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
        pattern.format(image_id=1)
    except (ValueError, LookupError, AttributeError) as error:
        fields, problem = [], f" ({error})"
    else:
        problem = ""
    if set(fields) != {"image_id"}:
        raise ValueError(
            f"--image-pattern {pattern!r}{problem}: a name with the field image_id and no other is needed, such as "
            "COCO_train2014_{image_id:012d}.jpg"
        )

    def image_name(image_id: int | str) -> str:
        try:
            return pattern.format(image_id=image_id)
        except ValueError as error:
            raise BadSample(str(image_id), f"image_id={image_id!r} does not fit {pattern!r}: {error}") from None

    return image_name


def decode_json_file(file: Path, kind: type[Kind]) -> Kind:
    """A file of JSON as a structure; raw parts of it lie in the file, which stays mapped.

    Raises:
        ValueError: it is no such file.
    """
    if file.stat().st_size == 0:
        raise ValueError(f"{file}: the file is empty")
    with file.open("rb") as opened:
        content = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return msgspec.json.decode(content[3 if content[:3] == b"\xef\xbb\xbf" else 0 :], type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{file}: not what is converted here: {error}") from None
