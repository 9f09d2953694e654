"""Exports of annotation tools, UBIAI and Label Studio: one document or task at a time becomes a record.

Imports msgspec, the standard library and siblings only.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from os.path import isfile
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from msgspec import Struct, field

from vlm.data.records.open import IMAGE_EXTENSIONS
from vlm.data.sample import PLACEHOLDER, BadSample, Record

Kind = TypeVar("Kind")


def convert_record(value: object, kind: type[Kind], sample_id: str = "?") -> Kind:
    """Convert a record into a typed structure.

    Raises:
        BadSample: the record does not have that structure; tells where it differs.
    """
    if isinstance(value, dict):
        sample_id = next((str(value[key]) for key in ("id", "documentName") if value.get(key) is not None), sample_id)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise BadSample(sample_id, str(error)) from None


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
        """The label of the span."""
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
    "token_start to token_end": lambda entity: _token_range(entity),
    "id": lambda entity: [entity.id],
}
"""How relations may refer to entities; a document uses the first way by which all of its references are found."""


class UbiaiReader:
    """Reads documents of a UBIAI export (JSON): `{"documentName", "document", "tokens", "relations"}`.

    `documentName` is the image's file; where it is no image's name (a PDF's, say), the image of that stem is
    taken. `tokens` (in some exports `entities`) are the marked spans: `text` (else cut out of `document`), `start` and
    `end` in characters, `token_start` and `token_end`, and the label as `entityLabel`, `entity_label` or `label`. A
    relation links two of them as `head` and `child`, either way round, each given as in `ADDRESSES`; what the relation
    is called (`relationLabel`, `relation`) does not matter.

    Args:
        folder: the image folder.
        left_out: counts questions without an answer, and documents without a question that has one.
        question_label: what questions are marked as.
        answer_label: what answers are marked as.
    """

    def __init__(self, folder: Path, left_out: Counter[str], *, question_label: str, answer_label: str):
        if question_label == answer_label:
            raise ValueError(f"--question-label and --answer-label are both {answer_label}; links could not be told")
        self._folder, self._left_out = folder, left_out
        self._labels = (question_label, answer_label)

    def __call__(self, value: object) -> Record | None:
        """Convert a document into a record of LLaVA's form; None where it has no answered question.

        Raises:
            BadSample: the value is no such document.
        """
        document = convert_record(value, Document)
        entities = document.entities or document.tokens or []
        questions = [entity for entity in entities if entity.label == self._labels[0]]
        answers_by_question = self._answers(document, entities)
        pairs = []
        for question in sorted(questions, key=lambda entity: entity.place):
            if answers := sorted(answers_by_question.get(id(question), []), key=lambda entity: entity.place):
                text = " ".join(_entity_text(answer, document) for answer in answers)
                pairs.append((_entity_text(question, document), text))
        self._left_out["questions without an answer"] += len(questions) - len(pairs)
        self._left_out["documents without an answered question"] += not pairs
        if not pairs:
            return None
        return make_llava_record(document.name, resolve_image_name(document.name, self._folder), pairs)

    def _answers(self, document: Document, entities: list[Entity]) -> dict[int, list[Entity]]:
        """Return the answers that each question is linked with, by `id` of the question."""
        answers: dict[int, list[Entity]] = {}
        relations = document.relations or []
        places = _entities_by_address(relations, entities, document.name)
        for relation in relations:
            for head in places[relation.head]:
                for child in places[relation.child]:
                    question, answer = (head, child) if head.label == self._labels[0] else (child, head)
                    known = answers.setdefault(id(question), [])
                    if (question.label, answer.label) == self._labels and answer not in known:
                        known.append(answer)
        return answers


def _entities_by_address(relations: list[Relation], entities: list[Entity], name: str) -> dict[int | str, list[Entity]]:
    """Return the entities by the references that relations use."""
    references = {end for relation in relations for end in (relation.head, relation.child)}
    for addresses in ENTITY_ADDRESSES.values():
        places: dict[int | str, list[Entity]] = {}
        for entity in entities:
            for address in addresses(entity):
                if address is not None:
                    places.setdefault(address, []).append(entity)
        if references <= places.keys():
            return places
    raise BadSample(
        name, f"relations name {sorted(map(str, references))}, which no entities have as {', '.join(ENTITY_ADDRESSES)}"
    )


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


class LabelStudioReader:
    """Reads tasks of Label Studio's exports JSON and JSON-MIN.

    JSON: `{"id", "data": {…}, "annotations": [{"was_cancelled", "result": [{"type", "from_name", "value"}]}]}`; the
    first annotation counts that was not cancelled. JSON-MIN: data and controls side by side, `{"id", "image",
    "caption": …}`. An answer is what was written into a text area (several texts line by line), or chosen (several
    choices with commas), or a rating or number.

    Args:
        folder: the image folder; see `resolve_local_image_name`.
        left_out: counts tasks without a completed annotation, and those without an answer.
        image_field: the data field that has the image.
        question_field: the data field that has the question; None: `prompt` is it.
        prompt: the question.
        from_name: the control that has the answer; None: the only one.

    Raises:
        ValueError: there is not one of `question_field` and `prompt`.
    """

    def __init__(
        self, folder: Path, left_out: Counter[str], *, image_field: str, question_field: str | None,
        prompt: str | None, from_name: str | None,
    ):  # fmt: skip
        if (question_field is None) == (prompt is None):
            raise ValueError("label-studio needs the question: either --prompt or --question-field (a field of `data`)")
        self._folder, self._left_out = folder, left_out
        self._image_field, self._question_field, self._prompt = image_field, question_field, prompt
        self._control = from_name
        self._control_is_given = from_name is not None

    def __call__(self, value: object) -> Record | None:
        """Convert a task into `{"id", "image", "question", "answer"}`; None where it was not completed.

        Raises:
            BadSample: the value is no such task.
            ValueError: there are several controls, and none is selected.
        """
        if isinstance(value, dict) and "data" not in value:
            task = convert_record({"data": value, "id": value.get("id", "?")}, LabelStudioTask)
            answer = self._min_answer(value)
        else:
            task = convert_record(value, LabelStudioTask)
            answer = self._answer(task)
        if not answer:
            return None
        question = self._prompt if self._question_field is None else task.data.get(self._question_field)
        image = task.data.get(self._image_field)
        if not isinstance(image, str) or not isinstance(question, str):
            name = self._image_field if not isinstance(image, str) else self._question_field
            raise BadSample(str(task.id), f"`{name}` must be a string of its data, which has {', '.join(task.data)}")
        name = resolve_local_image_name(image, self._folder)
        return {"id": task.id, "image": name, "question": question, "answer": answer}

    def _answer(self, task: LabelStudioTask) -> str:
        done = next((annotation for annotation in task.annotations or [] if not annotation.was_cancelled), None)
        if done is None:
            self._left_out["tasks without a completed annotation"] += 1
            return ""
        results = [result for result in done.result or [] if result.type in ANSWER_CONTROLS]
        control = self._answer_control({result.from_name for result in results})
        values = [result.value for result in results if result.from_name == control]
        return self._count_if_empty("\n".join(filter(None, map(_value_as_text, values))))

    def _min_answer(self, fields: Record) -> str:
        if fields.get("was_cancelled"):
            self._left_out["tasks without a completed annotation"] += 1
            return ""
        others = {name for name in fields if name not in (*JSON_MIN_FIELDS, self._image_field, self._question_field)}
        control = self._answer_control(others)
        return self._count_if_empty(_value_as_text(fields.get(control)) if control else "")

    def _answer_control(self, controls: set[str]) -> str | None:
        """Return the control that has the answer, the same in every task."""
        if self._control_is_given:
            return self._control
        known = controls if self._control is None else controls | {self._control}
        if len(known) > 1:
            raise ValueError(f"--from-name: which control has the answer? There are {', '.join(sorted(known))}")
        self._control = next(iter(known), None)
        return self._control

    def _count_if_empty(self, answer: str) -> str:
        self._left_out["tasks without an answer"] += not answer
        return answer


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
