"""Exports of annotation tools, UBIAI and Label Studio: one document or task at a time becomes a record."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from os.path import isfile
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from msgspec import Struct, field

from vlm.data.records.media import first_present
from vlm.data.records.open import stream_records
from vlm.data.records.positions import value_or_bad_sample
from vlm.data.records.tar import IMAGE_EXTENSIONS
from vlm.data.sample import PLACEHOLDER, BadSample, Record

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class ConversionContext:
    """The image folder, the cache's folder, and a count of the items that give no record, by reason."""

    folder: Path
    cache: Path
    left_out: Counter[str]
    follow_links: bool = False


def convert_record(value: object, kind: type[Kind]) -> Kind:
    """Convert a record into a typed structure; raise BadSample, which says where it differs, if it does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        sample_id = first_present(value, "id", "documentName") if isinstance(value, dict) else None
        raise BadSample("?" if sample_id is None else str(sample_id), str(error)) from None


def convert_records(
    make: Callable[[object], Record | None], source: str, context: ConversionContext
) -> Iterator[object]:
    """Convert each record of a file with a function, and leave out those for which it returns None."""
    for record in stream_records(source, context.cache, allow_pipe=True, follow_links=context.follow_links):
        made = record if isinstance(record, BadSample) else value_or_bad_sample(make, record)
        if made is not None:
            yield made


def make_llava_record(sample_id: str, image: str, questions: Iterable[tuple[str, str]]) -> Record:
    """Make a record of LLaVA's form from questions about one image and their answers."""
    turns: list[dict[str, str]] = []
    for question, answer in questions:
        lead = "" if turns else f"{PLACEHOLDER}\n"
        turns += [{"from": "human", "value": lead + question}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "image": image, "conversations": turns}


# UBIAI


class Entity(Struct):
    """A marked span of a document; its label has had several names."""

    text: str | None = None
    start: int | None = None
    end: int | None = None
    token_start: int | None = None
    token_end: int | None = None
    id: int | str | None = None
    entity_label: str | None = field(default=None, name="entityLabel")
    entity_label_snake_case: str | None = field(default=None, name="entity_label")
    entity_label_short: str | None = field(default=None, name="label")

    @property
    def label(self) -> str | None:
        """The label of the span, whatever its key."""
        return self.entity_label or self.entity_label_snake_case or self.entity_label_short

    @property
    def place(self) -> tuple[int, int]:
        """The key that sorts entities in reading order."""
        return (self.start or 0, self.token_start or 0)


class Relation(Struct):
    """A link between two entities."""

    head: int | str
    child: int | str


class Document(Struct):
    """The fields of a document that are read."""

    name: str = field(name="documentName")
    text: str = field(default="", name="document")
    tokens: list[Entity] | None = None
    entities: list[Entity] | None = None
    relations: list[Relation] | None = None


def _token_range(entity: Entity) -> Iterable[int]:
    if entity.token_start is None or entity.token_end is None:
        return ()
    return range(entity.token_start, entity.token_end + 1)


ENTITY_ADDRESSES: dict[str, Callable[[Entity], Iterable[int | str | None]]] = {
    "token_start": lambda entity: [entity.token_start],
    "start": lambda entity: [entity.start],
    "token_start to token_end": _token_range,
    "id": lambda entity: [entity.id],
}
"""How relations may refer to entities; a document uses the first way by which all of its references are found."""


def ubiai(
    source: str, context: ConversionContext, *, question_label: str = "QUESTION", answer_label: str = "ANSWER"
) -> Iterator[object]:
    """Convert documents of a UBIAI export (JSON): `{"documentName", "document", "tokens", "relations"}`.

    `documentName` is the image's file; if it is no image's name (a PDF's, say), the image of that stem is
    taken. `tokens` (in some exports `entities`) are the marked spans: `text` (else cut out of `document`), `start` and
    `end` in characters, `token_start` and `token_end`, and the label as `entityLabel`, `entity_label` or `label`. A
    relation links two of them as `head` and `child`, either way round, each given as in `ENTITY_ADDRESSES`; what the
    relation is called (`relationLabel`, `relation`) does not matter.

    Raises:
        ValueError: both labels are the same.
    """
    if question_label == answer_label:
        raise ValueError(f"--question-label and --answer-label are both {answer_label}; choose two labels")
    labels = (question_label, answer_label)

    def make_record(value: object) -> Record | None:
        """Make the record of a document; None if it has no answered question."""
        document = convert_record(value, Document)
        entities = document.entities or document.tokens or []
        questions = [entity for entity in entities if entity.label == question_label]
        answers_by_question = _link_answers(document, entities, labels)
        pairs = []
        for question in sorted(questions, key=attrgetter("place")):
            if answers := sorted(answers_by_question[id(question)], key=attrgetter("place")):
                text = " ".join(_entity_text(answer, document) for answer in answers)
                pairs.append((_entity_text(question, document), text))
        context.left_out["questions without an answer"] += len(questions) - len(pairs)
        context.left_out["documents without an answered question"] += not pairs
        if not pairs:
            return None
        return make_llava_record(document.name, resolve_image_name(document.name, context.folder), pairs)

    return convert_records(make_record, source, context)


def _link_answers(
    document: Document, entities: list[Entity], labels: tuple[str, str]
) -> defaultdict[int, list[Entity]]:
    """Return the answers that each question is linked with, by `id` of the question."""
    answers: defaultdict[int, list[Entity]] = defaultdict(list)
    relations = document.relations or []
    places = _entities_by_address(relations, entities, document.name)
    for relation in relations:
        for head, child in product(places[relation.head], places[relation.child]):
            question, answer = (head, child) if head.label == labels[0] else (child, head)
            if (question.label, answer.label) == labels and answer not in answers[id(question)]:
                answers[id(question)].append(answer)
    return answers


def _entities_by_address(relations: list[Relation], entities: list[Entity], name: str) -> dict[int | str, list[Entity]]:
    """Return the entities by the references that relations use."""
    references = {end for relation in relations for end in (relation.head, relation.child)}
    for addresses in ENTITY_ADDRESSES.values():
        places: defaultdict[int | str, list[Entity]] = defaultdict(list)
        for entity in entities:
            for address in addresses(entity):
                if address is not None:
                    places[address].append(entity)
        if references <= places.keys():
            return places
    named, known = sorted(map(str, references)), ", ".join(ENTITY_ADDRESSES)
    raise BadSample(name, f"relations refer to {named}, but no entity has this {known}")


def _entity_text(entity: Entity, document: Document) -> str:
    text = entity.text if entity.text is not None else document.text[entity.start or 0 : entity.end or 0]
    if not text.strip():
        raise BadSample(document.name, f"an entity at {entity.start} has no text")
    return " ".join(text.split())


def resolve_image_name(name: str, folder: Path) -> str:
    """Return the name of an image; for another file, that of the image with the same stem in a folder."""
    path = PurePosixPath(name)
    if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS:
        return name
    candidates = (str(path.with_suffix(f".{extension}")) for extension in IMAGE_EXTENSIONS)
    return next((candidate for candidate in candidates if isfile(folder / candidate)), name)


# Label Studio


class Result(Struct):
    """The value of one control."""

    type: str = ""
    from_name: str = ""
    value: Record = field(default_factory=dict)
    id: str | int | None = None
    image_rotation: float = 0


class Annotation(Struct):
    """One annotator's results for a task."""

    result: list[Result] | None = None
    was_cancelled: bool | None = None


class LabelStudioTask(Struct):
    """The fields of a task that are read."""

    data: Record
    id: int | str = "?"
    annotations: list[Annotation] | None = None


ANSWER_CONTROLS = {"textarea": "text", "choices": "choices", "rating": "rating", "number": "number"}
"""Type of a control whose result can be an answer -> the key of its value."""
JSON_MIN_FIELDS = frozenset((
    "id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "was_cancelled", "ground_truth",
    "annotators", "agreement", "inner_id", "comment_count", "unresolved_comment_count", "comment_authors",
))  # fmt: skip
"""Fields of the JSON-MIN form that belong neither to the data nor to a control."""


def label_studio(
    source: str,
    context: ConversionContext,
    *,
    image_field: str = "image",
    question_field: str | None = None,
    prompt: str | None = None,
    from_name: str | None = None,
) -> Iterator[object]:
    """Convert tasks of Label Studio's exports JSON and JSON-MIN to `{"id", "image", "question", "answer"}`.

    JSON: `{"id", "data": {…}, "annotations": [{"was_cancelled", "result": [{"type", "from_name", "value"}]}]}`; the
    first annotation counts that was not cancelled. JSON-MIN: data and controls side by side, `{"id", "image",
    "caption": …}`. An answer is what was written into a text area (several texts line by line), or chosen (several
    choices with commas), or a rating or number.

    Raises:
        ValueError: `prompt` and `question_field` are both given or both missing, or several controls have answers.
    """
    if (question_field is None) == (prompt is None):
        raise ValueError("label-studio needs a question: give --prompt, or --question-field (a field of `data`)")
    controls = set() if from_name is None else {from_name}
    fields = frozenset((*JSON_MIN_FIELDS, image_field, question_field)) - controls

    def make_record(value: object) -> Record | None:
        """Make the record of a task; None if the task is left out."""
        if isinstance(value, dict) and "data" not in value:
            task = convert_record({"data": value, "id": value.get("id", "?")}, LabelStudioTask)
            results = None if value.get("was_cancelled") else [item for item in value.items() if item[0] not in fields]
        else:
            task = convert_record(value, LabelStudioTask)
            results = _results(task)
        if results is None:
            context.left_out["tasks without a completed annotation"] += 1
            return None
        if from_name is None:
            controls.update(control for control, _ in results)
        if len(controls) > 1:
            raise ValueError(f"--from-name: which control has the answer? There are {', '.join(sorted(controls))}")
        answer = _value_as_text([value for control, value in results if control in controls])
        context.left_out["tasks without an answer"] += not answer
        if not answer:
            return None
        question = prompt if question_field is None else task.data.get(question_field)
        image = task.data.get(image_field)
        if not isinstance(image, str) or not isinstance(question, str):
            name = question_field if isinstance(image, str) else image_field
            raise BadSample(str(task.id), f"`{name}` must be a string of its data, which has {', '.join(task.data)}")
        image = resolve_local_image_name(image, context.folder)
        return {"id": task.id, "image": image, "question": question, "answer": answer}

    return convert_records(make_record, source, context)


def _results(task: LabelStudioTask) -> list[tuple[str, object]] | None:
    """Return controls and their values; None for a task without a completed annotation."""
    done = next((annotation for annotation in task.annotations or [] if not annotation.was_cancelled), None)
    if done is None:
        return None
    return [(result.from_name, result.value) for result in done.result or [] if result.type in ANSWER_CONTROLS]


def _value_as_text(value: object) -> str:
    """Return the value of a control as text."""
    if isinstance(value, dict):
        if isinstance(choices := value.get("choices"), list):
            return ", ".join(map(str, choices))
        return next((_value_as_text(value[key]) for key in ANSWER_CONTROLS.values() if key in value), "")
    if isinstance(value, list):
        return "\n".join(filter(None, map(_value_as_text, value)))
    return "" if value is None else str(value).strip()


def resolve_local_image_name(address: str, folder: Path) -> str:
    """Return the path within the image folder of the image that Label Studio names.

    `/data/local-files/?d=a/b.jpg` is `a/b.jpg` (as the folder is that of local files), `/data/upload/7/b.jpg` is
    `7/b.jpg` (Label Studio's `media/upload`), or else `b.jpg`. Any other address is returned unchanged.
    """
    parts = urlsplit(address)
    if parts.scheme or parts.netloc or not parts.path.startswith("/data/"):
        return address
    if parts.path.startswith("/data/local-files"):
        return next(iter(parse_qs(parts.query).get("d", [])), address).lstrip("/")
    name = unquote(parts.path).removeprefix("/data/").removeprefix("upload/")
    return name if isfile(folder / name) or not isfile(folder / Path(name).name) else Path(name).name
