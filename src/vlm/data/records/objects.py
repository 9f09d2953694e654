"""Boxes, points and time spans of a record: its key `objects`, and the marks in its texts that they stand for.

`docs/coordinates.md` states the forms. Where an object is in an image, and how a model writes that, is decided by
`vlm.data.coordinates`. Imports `sample`, `objects` and siblings of the standard library only.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from vlm.data.objects import BOX, NAME, NUM_VALUES, PIXELS, POINT, SHARE, SPAN, THOUSANDTHS, MarkedObject
from vlm.data.records.fields import is_empty
from vlm.data.sample import BadSample, ImageRef, Record, ToolCallTurn, Turn, VideoRef

LABEL_MARK, PLACE_MARK, LIST_MARK = "ref-object", "bbox", "objects"
OBJECT_MARK = re.compile(r"<(ref-object|bbox|objects)(?::(\d+(?:,\d+)*))?>")
"""A mark: the label of an object, its place, or a list of objects, with the numbers of the objects or without."""
ITEM_KEYS = ("label", BOX, POINT, SPAN, "image", "video", "units", "upright")
UNITS = (PIXELS, SHARE, THOUSANDTHS)
SWIFT_KEYS = ("ref", "bbox", "bbox_type", "image_id")
SWIFT_UNITS = {"real": PIXELS, "norm1": SHARE, "norm1000": THOUSANDTHS}
"""The types of boxes in ms-swift's records -> units."""


def read_objects(record: Record, turns: Sequence[Turn], sample_id: str) -> tuple[list[Turn], tuple[MarkedObject, ...]]:
    """Read the objects of a record; return its turns, with the numbers of objects in the marks, and the objects.

    Raises:
        BadSample: an object has another form, or marks and objects do not fit.
    """
    value = record.get("objects")
    if is_empty(value):
        return list(turns), ()
    if isinstance(value, dict):
        objects, names = _read_swift_objects(value, sample_id)
        objects, turns = _add_swift_labels(objects, names, turns, sample_id)
    elif isinstance(value, list):
        objects = [read_object(item, f"objects[{number}]", sample_id) for number, item in enumerate(value)]
    else:
        raise BadSample(sample_id, f"`objects` must be a list of mappings with a label and a box, got {value!r:.60}")
    _check_media(objects, turns, sample_id)
    numbered = _MarkNumbers(objects, sample_id)
    _check_calls(turns, sample_id)
    turns = [map_texts(turn, numbered.number_marks) for turn in turns]
    numbered.check_all_used()
    return turns, tuple(objects)


def read_object(item: object, where: str, sample_id: str) -> MarkedObject:
    """Read an object of our own form; `where` names it in messages.

    Raises:
        BadSample: it has another form.
    """
    if not isinstance(item, dict):
        raise BadSample(sample_id, f"`{where}` must be a mapping with a label and a box, got {item!r:.60}")
    if unknown := [key for key in item if key not in ITEM_KEYS and not is_empty(item[key])]:
        raise BadSample(sample_id, f"`{where}.{unknown[0]}`: allowed are {', '.join(ITEM_KEYS)}")
    kinds = [kind for kind in (BOX, POINT, SPAN) if item.get(kind) is not None]
    label = item.get("label")
    if label is not None and not isinstance(label, str):
        raise BadSample(sample_id, f"`{where}.label` must be a string, got {label!r:.40}")
    if len(kinds) > 1 or not (kinds or label):
        raise BadSample(sample_id, f"`{where}` must have one of box, point and span, got {' and '.join(kinds) or None}")
    kind = kinds[0] if kinds else NAME
    units = PIXELS if item.get("units") is None else item["units"]
    if units not in UNITS:
        raise BadSample(sample_id, f"`{where}.units`={units!r:.40}: allowed are {', '.join(UNITS)}")
    upright = True if item.get("upright") is None else item["upright"]
    if not isinstance(upright, bool):
        raise BadSample(sample_id, f"`{where}.upright` must be true or false, got {upright!r:.40}")
    values = () if kind == NAME else _read_values(item[kind], kind, f"{where}.{kind}", sample_id)
    medium = _read_index(item.get("video" if kind == SPAN else "image"), where, sample_id)
    return MarkedObject(kind, values, label, medium, units, upright)


def _read_values(value: object, kind: str, where: str, sample_id: str) -> tuple[float, ...]:
    """Read the numbers of a box, point or span, which must be in order."""
    numbers = list(value) if isinstance(value, list | tuple) else []
    is_numeric = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    if len(numbers) != NUM_VALUES[kind] or not is_numeric:
        needed = {BOX: "[x1, y1, x2, y2]", POINT: "[x, y]", SPAN: "[start, end] in seconds"}[kind]
        raise BadSample(sample_id, f"`{where}` must be {needed}, got {value!r:.60}")
    half = len(numbers) // 2
    if kind != POINT and any(last < first for first, last in zip(numbers[:half], numbers[half:], strict=True)):
        text = "a box ends before it begins: write [x1, y1, x2, y2], not a width and height"
        raise BadSample(sample_id, f"`{where}`={numbers}: {'a span ends before it begins' if kind == SPAN else text}")
    return tuple(map(float, numbers))


def _read_index(value: object, where: str, sample_id: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadSample(
            sample_id, f"`{where}`: the number of its image must be a whole number from 0, got {value!r:.40}"
        )
    return value


# ms-swift's form


def _read_swift_objects(value: Record, sample_id: str) -> tuple[list[MarkedObject], list[str]]:
    """Read `{"ref": […], "bbox": [[…], …], "bbox_type", "image_id"}`: its boxes and points, and its names."""
    if unknown := [key for key in value if key not in SWIFT_KEYS and not is_empty(value[key])]:
        listing = ", ".join(SWIFT_KEYS)
        raise BadSample(
            sample_id, f"`objects.{unknown[0]}`: as a mapping, `objects` has {listing}; otherwise it must be a list"
        )
    boxes, names = value.get("bbox") or [], value.get("ref") or []
    kind_of_box = value.get("bbox_type") or "real"
    images = value.get("image_id") or [0] * len(boxes)
    if kind_of_box not in SWIFT_UNITS:
        raise BadSample(sample_id, f"`objects.bbox_type`={kind_of_box!r:.40}: allowed are {', '.join(SWIFT_UNITS)}")
    if not all(isinstance(name, str) for name in names):
        raise BadSample(sample_id, "`objects.ref` must be a list of strings")
    if len(images) != len(boxes):
        raise BadSample(sample_id, f"`objects.image_id` has {len(images)} numbers for {len(boxes)} boxes")
    objects = []
    for number, (box, image) in enumerate(zip(boxes, images, strict=True)):
        kind = POINT if isinstance(box, list | tuple) and len(box) == NUM_VALUES[POINT] else BOX
        values = _read_values(box, kind, f"objects.bbox[{number}]", sample_id)
        medium = _read_index(image, f"objects.image_id[{number}]", sample_id)
        objects.append(MarkedObject(kind, values, medium=medium, units=SWIFT_UNITS[kind_of_box]))
    return objects, names


def _add_swift_labels(
    objects: list[MarkedObject], names: list[str], turns: Sequence[Turn], sample_id: str
) -> tuple[list[MarkedObject], list[Turn]]:
    """Give each box the last name before it in the text, and number the marks of names.

    A name that no box follows becomes an object without a place.
    """
    objects = list(objects)
    remaining, next_box, current = iter(names), 0, None
    places: list[int | None] = []  # for each name, the first object that has it
    marks = [match for text in _texts(turns) for match in OBJECT_MARK.finditer(text)]
    for mark in marks:
        if mark[1] == LABEL_MARK:
            if (current := next(remaining, None)) is None:
                raise BadSample(sample_id, f"its text has more <{LABEL_MARK}> than `objects.ref` has names")
            places.append(None)
        elif mark[1] == PLACE_MARK and next_box < len(objects):
            objects[next_box] = replace(objects[next_box], label=current)
            if places and places[-1] is None:
                places[-1] = next_box
            next_box += 1
    if (unused := next(remaining, None)) is not None:
        raise BadSample(sample_id, f"{unused!r:.40} of `objects.ref` does not occur in its text")
    numbers = []
    for name, place in zip(names, places, strict=True):
        if place is None:
            objects.append(MarkedObject(NAME, label=name))
        numbers.append(len(objects) - 1 if place is None else place)
    following = iter(numbers)

    def number_name(match: re.Match[str]) -> str:
        """Return the mark of a name with the number of its object; another mark as it is."""
        return f"<{LABEL_MARK}:{next(following)}>" if match[1] == LABEL_MARK else match[0]

    return objects, [map_texts(turn, lambda text: OBJECT_MARK.sub(number_name, text)) for turn in turns]


# Marks


@dataclass
class _MarkNumbers:
    """Numbers marks: a label or place gets the next object's number, a list those of all objects with a place."""

    objects: Sequence[MarkedObject]
    sample_id: str

    def __post_init__(self):
        """Start before the first mark."""
        self.labels = iter([number for number, item in enumerate(self.objects) if item.label is not None])
        self.placed = [number for number, item in enumerate(self.objects) if item.kind != NAME]
        self.places = iter(self.placed)
        self.used: set[int] = set()

    def number_marks(self, text: str) -> str:
        """Return a text whose marks have numbers."""
        return OBJECT_MARK.sub(self._number, text) if "<" in text else text

    def _number(self, match: re.Match[str]) -> str:
        kind = match[1]
        numbers = self._given(match) if match[2] else self._next(kind)
        if kind != LIST_MARK and len(numbers) != 1:
            raise BadSample(self.sample_id, f"{match[0]}: it stands for one object; <{LIST_MARK}:…> lists several")
        wanting = [number for number in numbers if kind == LABEL_MARK and self.objects[number].label is None]
        wanting += [number for number in numbers if kind != LABEL_MARK and self.objects[number].kind == NAME]
        if wanting:
            needed = "label" if kind == LABEL_MARK else "box, point or span"
            raise BadSample(self.sample_id, f"its text has {match[0]}, but objects[{wanting[0]}] has no {needed}")
        self.used.update(numbers)
        return f"<{kind}:{','.join(map(str, numbers))}>"

    def _given(self, match: re.Match[str]) -> list[int]:
        numbers = [int(number) for number in match[2].split(",")]
        if max(numbers) >= len(self.objects):
            allowed = f"the record has {len(self.objects)} objects, counted from 0"
            raise BadSample(self.sample_id, f"its text has {match[0]}, but {allowed}")
        return numbers

    def _next(self, kind: str) -> list[int]:
        if kind == LIST_MARK:
            if not self.placed:
                raise BadSample(self.sample_id, f"its text has <{LIST_MARK}>, but no object has a place")
            return self.placed
        number = next(self.labels if kind == LABEL_MARK else self.places, None)
        if number is None:
            what = "labels" if kind == LABEL_MARK else "boxes, points and spans"
            raise BadSample(self.sample_id, f"its text has more <{kind}> than `objects` has {what}")
        return [number]

    def check_all_used(self) -> None:
        """Raise BadSample if an object has no mark."""
        if unused := [number for number in range(len(self.objects)) if number not in self.used]:
            advice = f"write <{PLACE_MARK}> for each, or <{LIST_MARK}> for all of them"
            raise BadSample(self.sample_id, f"objects[{unused[0]}] does not occur in its text; {advice}")


def _check_media(objects: Sequence[MarkedObject], turns: Sequence[Turn], sample_id: str) -> None:
    """Raise BadSample if an object is of an image or video that the record does not show."""
    parts = [part for turn in turns for part in turn.content]
    for number, marked in enumerate(objects):
        kind, name = (VideoRef, "video") if marked.kind == SPAN else (ImageRef, "image")
        total = sum(isinstance(part, kind) for part in parts)
        if marked.kind != NAME and marked.medium >= total:
            shown = f"the record shows {total or 'no'} {name}{'' if total == 1 else 's'}, counted from 0"
            raise BadSample(sample_id, f"objects[{number}] is of {name} {marked.medium}, but {shown}")


def _check_calls(turns: Sequence[Turn], sample_id: str) -> None:
    """Raise BadSample for a mark in an argument of a call: marks are replaced only in texts."""
    for turn in turns:
        if isinstance(turn, ToolCallTurn) and (match := OBJECT_MARK.search(str(turn.tool_calls))):
            problem = (
                f"{match[0]} is in an argument of a call; write the numbers there, in the coordinates of the model"
            )
            raise BadSample(sample_id, problem)


def _texts(turns: Sequence[Turn]) -> Iterator[str]:
    parts = (part for turn in turns for part in (turn.thinking, *turn.content))
    yield from (part for part in parts if isinstance(part, str))


def map_texts(turn: Turn, change: Callable[[str], str]) -> Turn:
    """Return a turn with its thinking and then its texts changed, in the order in which templates write them."""
    thinking = None if turn.thinking is None else change(turn.thinking)
    content = tuple(change(part) if isinstance(part, str) else part for part in turn.content)
    return replace(turn, thinking=thinking, content=content)
