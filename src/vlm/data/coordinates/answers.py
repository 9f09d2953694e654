"""Parses objects from a model's answer: the places that it wrote, in pixels of the stored images turned upright."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from vlm.data.coordinates.geometry import ImageView, Size, make_views
from vlm.data.coordinates.table import DEFAULT, get_convention
from vlm.data.coordinates.writing import is_unsized, view_for
from vlm.data.encoding.thinking import without_thinking
from vlm.data.objects import BOX, POINT, SPAN, MarkedObject
from vlm.data.processor import Processor
from vlm.data.sample import Sample
from vlm.data.vision.images import read_stored_size


def parse_answer(text: str, convention: str, views: Sequence[ImageView], image: int = 0) -> list[MarkedObject]:
    """Return the objects in an answer, in order, in pixels of the stored image turned upright.

    Args:
        text: the answer.
        convention: the name of the model's convention.
        views: what the model sees of each image. Only time spans are read without views, or if the convention counts
            pixels that the model sees and their number is unknown.
        image: the number of the image that the answer is about, if the answer does not say so itself.
    """
    kind = get_convention(convention)
    seen = {number: view_for(kind, view) for number, view in enumerate(views) if not is_unsized(kind, view)}
    objects = []
    for place in kind.read(text, seen[image].seen_size if image in seen else (1.0, 1.0)):
        medium = image if place.medium is None else place.medium
        if place.kind == SPAN:
            objects.append(MarkedObject(SPAN, place.values, place.label))
        elif medium in seen:
            objects.append(MarkedObject(place.kind, seen[medium].to_pixels(place.values), place.label, medium))
    return objects


def parse_answer_to_images(
    text: str, processor: Processor, sizes: Sequence[Size], image: int = 0
) -> list[MarkedObject]:
    """Return the objects of an answer, without its thinking, about images of these upright heights and widths.

    `image` is the number of the image that the answer is about.
    """
    views = make_views(processor, sizes)
    return parse_answer(without_thinking(text), processor.coordinates or DEFAULT, views, image)


def parse_answer_to_sample(
    text: str, processor: Processor, sample: Sample, sizes: Sequence[Size] | None = None
) -> list[MarkedObject]:
    """Return the objects of an answer to a sample, as far as the model sees them: see `visible_objects`.

    They belong to the image of the true objects if these are all in one image, else to the first image.

    Args:
        text: the answer.
        processor: the model's.
        sample: the sample with the question.
        sizes: upright heights and widths of its images, without frames of videos; None: read from the files.

    Raises:
        BadSample: an image does not open.
    """
    sizes = _read_sizes(sample) if sizes is None else sizes
    images = {marked.medium for marked in true_objects(sample) if marked.kind != SPAN}
    objects = parse_answer_to_images(text, processor, sizes, images.pop() if len(images) == 1 else 0)
    return visible_objects(objects, make_views(processor, sizes))


def _read_sizes(sample: Sample) -> list[Size]:
    """Return the upright height and width of each image of a sample, except frames of videos."""
    return [read_stored_size(image, sample.id).upright for image in sample.images if image.frame is None]


def true_objects(sample: Sample) -> list[MarkedObject]:
    """Return the objects whose places are in the last reply of a sample."""
    return [marked for marked in sample.objects if marked.is_answer]


def visible_objects(objects: Sequence[MarkedObject], views: Sequence[ImageView]) -> list[MarkedObject]:
    """Return the visible part of objects in pixels of upright images: boxes are clipped where the image is cropped.

    Boxes and points in cropped parts are left out. Answers and true objects are compared in this form, so that what a
    model does not see counts neither for nor against it.
    """
    visible = []
    for marked in objects:
        if marked.kind not in (BOX, POINT) or marked.medium >= len(views):
            visible.append(marked)
        elif (values := views[marked.medium].clip(marked.values)) is not None:
            visible.append(replace(marked, values=values))
    return visible


def true_objects_of_reply(
    sample: Sample, processor: Processor, sizes: Sequence[Size] | None = None
) -> list[MarkedObject]:
    """Return the objects whose places the last reply tells, as far as the model sees them: see `visible_objects`.

    These are the record's objects, or else those written in its text. Arguments are those of `parse_answer_to_sample`.

    Raises:
        BadSample: an image does not open.
    """
    if objects := true_objects(sample):
        if all(marked.kind == SPAN for marked in objects):
            return objects
        return visible_objects(objects, make_views(processor, _read_sizes(sample) if sizes is None else sizes))
    if not sample.turns or sample.turns[-1].role != "assistant" or sample.objects:
        return []
    text = "".join(part for part in sample.turns[-1].content if isinstance(part, str))
    return parse_answer_to_sample(text, processor, sample, sizes)


def decode_answer(processor: Processor, ids: list[int]) -> str:
    """Return the text of generated ids without special tokens, except those of the model's coordinates."""
    tokenizer, pattern = processor.tokenizer, processor.coordinate_tokens
    special = _special_ids(tokenizer)
    kept = set() if pattern is None else {number for number, text in special.items() if pattern.fullmatch(text)}
    if not kept:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    shown = [number for number in map(int, ids) if number in kept or number not in special]
    return str(tokenizer.decode(shown, skip_special_tokens=False)).strip()


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
