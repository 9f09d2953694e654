"""Conversions of published data sets: Conceptual Captions, COCO's captions, VQA; generators as `convert` takes them."""

import mmap
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import msgspec

from vlm.data.records.files import check_is_records, uncompressed_file
from vlm.data.records.positions import value_or_bad_sample
from vlm.data.records.tar import IMAGE_EXTENSIONS
from vlm.data.sample import BadSample, Record
from vlm.data.tools.exports import ConversionContext, Kind, convert_record, make_llava_record
from vlm.data.tools.table import FOLDER_SIZE, Table

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""LLaVA's instruction for VQAv2 (arXiv:2310.03744)."""


def conceptual_captions(
    source: str, context: ConversionContext, *, url_column: str | None = None, caption_column: str | None = None
) -> Iterator[Record | BadSample]:
    """Convert a table of captions and URLs, whose images `vlm data download` has put into the image folder.

    The table is read as `vlm data download` reads it, with or without a header. Row 12, counted from 0 without the
    header, has the image `00000/000000012.jpg`, or another extension. Rows without an image or a caption are left out.

    A column is named, or numbered from 1 if there is no header; by default it is recognised, see `table.Table`.
    """
    rows = Table(Path(source), url_column, caption_column).rows()
    for number, rows_of_folder in groupby(rows, lambda row: row.number // FOLDER_SIZE):
        names = _image_names_by_row(context.folder / f"{number:05d}")
        for row in rows_of_folder:
            name = names.get(row.number)
            if name and row.caption:
                yield {"id": f"{row.number:09d}", "image": f"{number:05d}/{name}", "caption": row.caption}
            else:
                context.left_out["rows without a caption" if name else "rows without an image"] += 1


def _image_names_by_row(folder: Path) -> dict[int, str]:
    """Return the names of the images in a folder, by row."""
    files = folder.iterdir() if folder.is_dir() else ()
    images = [file for file in files if file.stem.isdecimal() and file.suffix[1:].lower() in IMAGE_EXTENSIONS]
    return {int(image.stem): image.name for image in images}


class CocoImage(msgspec.Struct):
    """An image of COCO's."""

    id: int | str
    file_name: str


class CocoCaption(msgspec.Struct):
    """A caption of COCO's."""

    image_id: int | str
    caption: str
    id: int | str | None = None


class CocoFile(msgspec.Struct):
    """COCO's file; annotations are parsed one by one."""

    images: list[CocoImage]
    annotations: list[msgspec.Raw]


def coco_captions(source: str, context: ConversionContext) -> Iterator[Record | BadSample]:
    """Convert COCO's `captions_*.json`: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    Each caption becomes a record. About 250 bytes for an image and 80 for a caption stay in memory; the file is mapped.
    """
    file = decode_json_file(Path(source), CocoFile)
    names = {image.id: image.file_name for image in file.images}

    def make_caption_record(annotation: msgspec.Raw) -> Record:
        """Make the record of an annotation."""
        caption = convert_record(msgspec.json.decode(annotation), CocoCaption)
        sample_id = str(caption.image_id if caption.id is None else caption.id)
        if caption.image_id not in names:
            raise BadSample(sample_id, f"image_id={caption.image_id} is none of `images`")
        return {"id": sample_id, "image": names[caption.image_id], "caption": caption.caption.strip()}

    for annotation in file.annotations:
        yield value_or_bad_sample(make_caption_record, annotation)


class VqaQuestion(msgspec.Struct):
    """A question about an image."""

    question_id: int | str
    image_id: int | str
    question: str


class VqaText(msgspec.Struct):
    """One person's answer."""

    answer: str


class VqaAnnotation(msgspec.Struct):
    """The answers to a question."""

    question_id: int | str
    multiple_choice_answer: str | None = None
    answers: list[VqaText | str] | None = None


class VqaQuestions(msgspec.Struct):
    """The file of questions."""

    questions: list[VqaQuestion]


class VqaAnnotations(msgspec.Struct):
    """The file of answers; annotations are parsed one by one."""

    annotations: list[msgspec.Raw]


def vqa(
    source: str,
    context: ConversionContext,
    *,
    annotations: str,
    image_pattern: str,
    group: bool = True,
    instruction: str = SHORT_ANSWER,
) -> Iterator[Record | BadSample]:
    """Convert VQAv2's questions and answers, by default all about one image into one conversation.

    Questions `{"questions": [{"question_id", "image_id", "question"}]}` and annotations `{"annotations":
    [{"question_id", "multiple_choice_answer", "answers": [{"answer"}]}]}`, where the most common of `answers` counts if
    there is no `multiple_choice_answer`. All are in memory, about 400 bytes per question.

    Args:
        source: the file of questions.
        context: of the conversion.
        annotations: the file of answers.
        image_pattern: name of an image, with `{image_id}`.
        group: whether the questions about an image become one record.
        instruction: a line after the first question of a record; empty for none.

    Raises:
        ValueError: a file has another form, or the pattern is invalid.
    """
    image_name = make_image_namer(image_pattern)
    answers = dict(_read_vqa_answers(Path(annotations)))
    groups: dict[int | str, list[VqaQuestion]] = defaultdict(list)
    for question in decode_json_file(Path(source), VqaQuestions).questions:
        if question.question_id in answers:
            groups[question.image_id if group else question.question_id].append(question)
        else:
            context.left_out["questions without an answer"] += 1

    def make_record(item: tuple[int | str, list[VqaQuestion]]) -> Record:
        """Make one record of the questions about an image."""
        record_id, questions = item
        pairs = [(question.question, answers[question.question_id]) for question in questions]
        if instruction:
            pairs[0] = (f"{pairs[0][0]}\n{instruction}", pairs[0][1])
        return make_llava_record(str(record_id), image_name(questions[0].image_id), pairs)

    for item in groups.items():
        yield value_or_bad_sample(make_record, item)


def _read_vqa_answers(file: Path) -> Iterator[tuple[int | str, str]]:
    """Iterate over questions and their answers."""
    for number, raw in enumerate(decode_json_file(file, VqaAnnotations).annotations, start=1):
        try:
            annotation = msgspec.json.decode(raw, type=VqaAnnotation)
        except msgspec.DecodeError as error:
            raise ValueError(f"--annotations {file}: annotation {number}: {error}") from None
        answers = Counter(answer if isinstance(answer, str) else answer.answer for answer in annotation.answers or [])
        if annotation.multiple_choice_answer is not None:
            yield annotation.question_id, annotation.multiple_choice_answer
        elif answers:
            yield annotation.question_id, answers.most_common(1)[0][0]


def make_image_namer(pattern: str) -> Callable[[int | str], str]:
    """Make a function that returns the name of an image by its id; ValueError if `image_id` is not the only field."""
    problem = ""
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
        pattern.format(image_id=1)
    except (ValueError, LookupError, AttributeError) as error:
        fields, problem = set(), f" ({error})"
    if fields != {"image_id"}:
        needed = "a name with the field image_id and no other is needed, such as COCO_train2014_{image_id:012d}.jpg"
        raise ValueError(f"--image-pattern {pattern!r}{problem}: {needed}")

    def image_name(image_id: int | str) -> str:
        """Return the file name of an image."""
        try:
            return pattern.format(image_id=image_id)
        except ValueError as error:
            raise BadSample(str(image_id), f"image_id={image_id!r} does not fit {pattern!r}: {error}") from None

    return image_name


def decode_json_file(file: Path, kind: type[Kind]) -> Kind:
    """Decode a JSON file into a structure; its raw parts are views of the file, which stays mapped."""
    check_is_records(file)
    with uncompressed_file(file) as plain, plain.open("rb") as opened:
        content = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return msgspec.json.decode(content[3 if content[:3] == b"\xef\xbb\xbf" else 0 :], type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{file}: not what is converted here: {error}") from None
