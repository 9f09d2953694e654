"""Writes the objects of a record as text: every mark is replaced by what the model writes for it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.data.coordinates.convention import Convention, Place
from vlm.data.coordinates.geometry import ImageView, make_views
from vlm.data.coordinates.table import DEFAULT, find_token_problem, get_convention
from vlm.data.encoding.processor_errors import processor_errors
from vlm.data.encoding.thinking import without_thinking
from vlm.data.objects import BOX, NAME, PIXELS, SPAN, UNIT_SIZES, MarkedObject, turn_upright
from vlm.data.processor import Processor
from vlm.data.records.objects import LABEL_MARK, LIST_MARK, OBJECT_MARK, map_texts
from vlm.data.sample import BadSample, Sample, Turn
from vlm.data.vision.images import StoredSize, read_stored_size

TOLERANCE = 1.0
"""Pixels by which a box may exceed its image, because widths and heights are rounded; it is clipped at the edge."""


def write_objects(sample: Sample, processor: Processor) -> Sample:
    """Return a sample whose marks are replaced by the model's text; its objects are in pixels of upright images.

    The images are those of the record, so this must come before videos are replaced by their frames.

    Raises:
        BadSample: an object is outside its image or not visible, the convention has no such objects, or the tokenizer
            lacks tokens.
    """
    if not sample.objects:
        return sample
    convention = get_convention(processor.coordinates or DEFAULT)
    if problem := find_token_problem(convention, processor.tokenizer):
        raise BadSample(sample.id, problem)
    has_places = any(marked.kind not in (NAME, SPAN) for marked in sample.objects)
    sizes = [read_stored_size(image, sample.id) for image in sample.images] if has_places else []
    objects = [_in_upright_pixels(marked, sizes, number, sample.id) for number, marked in enumerate(sample.objects)]
    with processor_errors("the processor", sample.id):
        views = make_views(processor, [size.upright for size in sizes])
    writer = _Writer(convention, objects, views, sample.id)
    turns = tuple(map_texts(turn, writer.write_marks) for turn in sample.turns)
    answered = _numbers_of_answer(sample.turns)
    flagged = (replace(marked, is_answer=number in answered) for number, marked in enumerate(objects))
    return replace(sample, turns=turns, objects=tuple(flagged))


def view_for(convention: Convention, view: ImageView) -> ImageView:
    """Return what the numbers of a convention refer to: what the model sees, or the stored image.

    Raises:
        ValueError: they count pixels that the model sees, and the processor does not say how many these are.
    """
    if convention.sees_stored_image:
        return view.whole_image()
    if is_unsized(convention, view):
        raise ValueError(
            f"dataset.coordinates={convention.name}: it counts pixels of the resized image, and this model's processor "
            "does not tell its size; choose one that counts shares of the image, or pixels"
        )
    return view


def is_unsized(convention: Convention, view: ImageView) -> bool:
    """Return whether a convention counts pixels that the model sees, and their number is not known."""
    return convention.steps is None and not convention.sees_stored_image and not view.is_sized


@dataclass
class _Writer:
    """Writes the marks of one sample; the objects are in pixels of the upright images."""

    convention: Convention
    objects: Sequence[MarkedObject]
    views: Sequence[ImageView]
    sample_id: str

    def write_marks(self, text: str) -> str:
        """Return a text with what the model writes instead of its marks."""
        return OBJECT_MARK.sub(self._write, text) if "<" in text else text

    def _write(self, match: re.Match[str]) -> str:
        numbers = [int(number) for number in match[2].split(",")]
        if match[1] == LABEL_MARK:
            return self.convention.write_label(self.objects[numbers[0]].label or "")
        try:
            places = [self._place(number) for number in numbers]
            return self.convention.write_all(places) if match[1] == LIST_MARK else self.convention.write(places[0])
        except ValueError as error:
            if isinstance(error, BadSample):
                raise
            raise BadSample(self.sample_id, str(error)) from error

    def _place(self, number: int) -> Place:
        marked = self.objects[number]
        if marked.kind == SPAN:
            return Place(SPAN, marked.values, marked.label)
        view = view_for(self.convention, self.views[marked.medium])
        shares = view.to_shares(marked.values)
        inside = tuple(min(max(share, 0.0), 1.0) for share in shares)
        half = len(shares) // 2
        is_lost = inside != shares and (
            marked.kind != BOX or any(inside[axis] == inside[axis + half] for axis in range(half))
        )
        if is_lost and max(abs(a - b) for a, b in zip(inside, shares, strict=True)) > 1e-6:
            problem = "the model does not see it: it lies outside the middle that its processor cuts out"
            raise BadSample(self.sample_id, f"objects[{number}] at {_shown(marked.values)}: {problem}")
        return Place(marked.kind, inside, marked.label, view.seen_size, marked.medium)


def _in_upright_pixels(marked: MarkedObject, sizes: Sequence[StoredSize], number: int, sample_id: str) -> MarkedObject:
    """Return an object in pixels of its image turned upright, within its bounds.

    Raises:
        BadSample: the object is outside the image.
    """
    if marked.kind in (NAME, SPAN):
        return marked
    size = sizes[marked.medium]
    height, width = size.upright
    sides = (width, height) if marked.upright else (size.width, size.height)
    values = marked.values
    if unit := UNIT_SIZES.get(marked.units):
        values = tuple(value / unit * sides[index % 2] for index, value in enumerate(values))
    if not marked.upright:
        values = turn_upright(values, size.orientation, sides)
    bounds = (width, height)
    inside = tuple(min(max(value, 0.0), bounds[index % 2]) for index, value in enumerate(values))
    if any(abs(value - limit) > TOLERANCE for value, limit in zip(values, inside, strict=True)):
        where = f"{marked.kind} {_shown(values)} is outside its image, which has {width}×{height} pixels"
        hint = "" if marked.units != PIXELS or max(values) > 1 else "; are these shares of its sides (units=share)?"
        raise BadSample(sample_id, f"objects[{number}]: the {where}{hint}")
    return replace(marked, values=inside, units=PIXELS, upright=True)


def _shown(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def _numbers_of_answer(turns: Sequence[Turn]) -> set[int]:
    """Return the numbers of the objects whose places are in the last turn, if it is a reply, after its thinking."""
    if not turns or turns[-1].role != "assistant":
        return set()
    text = without_thinking("".join(part for part in turns[-1].content if isinstance(part, str)))
    marks = [match for match in OBJECT_MARK.finditer(text) if match[1] != LABEL_MARK]
    return {int(number) for match in marks for number in match[2].split(",")}
