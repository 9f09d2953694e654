"""Conversions of boxes: COCO's detections, RefCOCO, Label Studio's rectangles; generators as `convert` takes them.

They yield records with `objects` (docs/coordinates.md).
"""

import json
import pickle
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct, field

from vlm.data.records.files import check_is_records
from vlm.data.records.positions import value_or_bad_sample
from vlm.data.sample import PLACEHOLDER, BadSample, Record
from vlm.data.tools.corpora import CocoImage, decode_json_file
from vlm.data.tools.exports import (
    ConversionContext,
    LabelStudioTask,
    Result,
    convert_record,
    convert_records,
    resolve_local_image_name,
)

DETECTION_PROMPT = "Detect all objects in the image."
REFERRING_PROMPT = "Where is {label}?"


def make_detection_record(sample_id: str, image: str, objects: list[Record], prompt: str, answer: str) -> Record:
    """Make a record of LLaVA's form that asks about objects of one image."""
    turns = [{"from": "human", "value": f"{PLACEHOLDER}\n{prompt}"}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "image": image, "objects": objects, "conversations": turns}


# COCO


class CocoCategory(Struct):
    """A category of COCO's."""

    id: int
    name: str


class CocoBox(Struct):
    """An annotation of COCO's: `[x, y, width, height]` in pixels."""

    image_id: int | str
    category_id: int
    bbox: list[float]
    id: int | str | None = None
    iscrowd: int = 0


class CocoInstances(Struct):
    """COCO's file of detections; annotations are parsed one by one."""

    images: list[CocoImage]
    annotations: list[msgspec.Raw]
    categories: list[CocoCategory]


def coco_detections(
    source: str, context: ConversionContext, *, prompt: str = DETECTION_PROMPT, by_label: bool = False
) -> Iterator[Record | BadSample]:
    """Convert COCO's `instances_*.json`: a record for each image with all of its boxes, or one for each label there.

    `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id", "bbox", "iscrowd"}], "categories":
    [{"id", "name"}]}` (https://cocodataset.org/#format-data). Boxes around crowds are left out. About 250 bytes for an
    image and 500 for a box stay in memory.

    Args:
        source: the file.
        context: of the conversion.
        prompt: what is asked; `{label}` in it stands for the label, with `by_label`, else for all labels of the image.
        by_label: whether each label of an image becomes a record.
    """
    file = decode_json_file(Path(source), CocoInstances)
    names = {category.id: category.name for category in file.categories}
    known = {image.id for image in file.images}
    boxes: dict[int | str, list[CocoBox]] = defaultdict(list)
    for raw in file.annotations:
        box = value_or_bad_sample(lambda value: _read_coco_box(value, names, known), raw)
        if isinstance(box, BadSample):
            yield box
        elif box.iscrowd:
            context.left_out["boxes around crowds"] += 1
        else:
            boxes[box.image_id].append(box)
    for image in file.images:
        objects = [_coco_object(box, names) for box in boxes.get(image.id, ())]
        labels = list(dict.fromkeys(str(item["label"]) for item in objects))
        context.left_out["images without a box"] += not objects
        groups = [[label] for label in labels] if by_label else [labels] if labels else []
        for number, group in enumerate(groups):
            name = f"{image.id}-{number}" if by_label else str(image.id)
            chosen = [item for item in objects if item["label"] in group]
            asked = prompt.replace("{label}", " ; ".join(group))
            yield make_detection_record(name, image.file_name, chosen, asked, "<objects>")


def _read_coco_box(raw: msgspec.Raw, names: dict[int, str], images: set[int | str]) -> CocoBox:
    box = convert_record(msgspec.json.decode(raw), CocoBox)
    name = str(box.image_id if box.id is None else box.id)
    if box.category_id not in names:
        raise BadSample(name, f"category_id={box.category_id} is none of `categories`")
    if box.image_id not in images:
        raise BadSample(name, f"image_id={box.image_id} is none of `images`")
    if len(box.bbox) != 4:
        raise BadSample(name, f"bbox={box.bbox}: [x, y, width, height] is needed")
    return box


def _coco_object(box: CocoBox, names: dict[int, str]) -> Record:
    return {"label": names[box.category_id], "box": corners(*box.bbox)}


def corners(x: float, y: float, width: float, height: float) -> list[float]:
    """Return `[x1, y1, x2, y2]` of a box that is given by its corner and size."""
    return [round(value, 4) for value in (x, y, x + width, y + height)]


# RefCOCO


class Sentence(Struct):
    """A sentence that refers to an object."""

    sent: str
    sent_id: int | None = None


class Reference(Struct):
    """An object of RefCOCO's, and the sentences that refer to it."""

    ref_id: int
    ann_id: int
    image_id: int | str
    split: str
    sentences: list[Sentence] = field(default_factory=list)


def refcoco(
    source: str, context: ConversionContext, *, instances: str, split: str = "train", prompt: str = REFERRING_PROMPT
) -> Iterator[Record | BadSample]:
    """Convert RefCOCO, RefCOCO+ and RefCOCOg: each sentence becomes a record, its answer the box of the object.

    `refs(unc).p`, `refs(google).p` or `refs(umd).p` (https://github.com/lichengunc/refer), or the same list as JSON:
    `[{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent"}]}, …]`; and `instances.json` next to it, in
    COCO's form. Of the pickle only lists, mappings, texts and numbers are read: it cannot run code.

    Args:
        source: the file of references.
        context: of the conversion.
        instances: the file of boxes.
        split: `train`, `val`, `testA`, `testB` or `test`.
        prompt: what is asked; `{label}` in it stands for the sentence.

    Raises:
        ValueError: a file has another form, or no reference is in the split.
    """
    file = decode_json_file(Path(instances), CocoInstances)
    names = {image.id: image.file_name for image in file.images}
    boxes = {box.id: box for box in (msgspec.json.decode(raw, type=CocoBox) for raw in file.annotations)}
    splits = set[str]()
    for value in _read_references(Path(source)):
        reference = value_or_bad_sample(lambda item: convert_record(item, Reference), value)
        if isinstance(reference, BadSample):
            yield reference
            continue
        splits.add(reference.split)
        if reference.split == split:
            yield from _referring_records(reference, boxes, names, prompt)
    if split not in splits:
        raise ValueError(f"--split {split}: {source} has {', '.join(sorted(splits)) or 'no references'}")


def _referring_records(
    reference: Reference, boxes: dict[int | str | None, CocoBox], names: dict[int | str, str], prompt: str
) -> Iterator[Record | BadSample]:
    box = boxes.get(reference.ann_id)
    if box is None or reference.image_id not in names:
        missing = "ann_id" if box is None else "image_id"
        yield BadSample(str(reference.ref_id), f"{missing}={getattr(reference, missing)} is not in the file of boxes")
        return
    for number, sentence in enumerate(reference.sentences):
        label = " ".join(sentence.sent.split())
        objects: list[Record] = [{"label": label, "box": corners(*box.bbox)}]
        asked = prompt.replace("{label}", "<ref-object>")
        name = f"{reference.ref_id}-{number}"
        yield make_detection_record(name, names[reference.image_id], objects, asked, "<bbox>")


class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of lists, mappings, texts and numbers; one that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> object:
        """Raise UnpicklingError: nothing is imported."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not imported")


def _read_references(path: Path) -> list[object]:
    """Read a list of references from JSON or from a pickle, of Python 2 as RefCOCO's are."""
    try:
        if path.suffix == ".p":
            with path.open("rb") as opened:
                value = PlainUnpickler(opened, encoding="utf-8").load()
        else:
            check_is_records(path)
            value = json.loads(path.read_text(encoding="utf-8"))
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a list of references: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"{path}: a list of references is needed, got {type(value).__name__}")
    return value


# Label Studio

BOX_CONTROLS = ("rectanglelabels", "rectangle", "keypointlabels", "keypoint")
"""Types of controls whose results are boxes or points."""
LABELS = "labels"
"""The type of a control that labels the results of others, `rectangle` and `keypoint`: its result has their id."""


def label_studio_boxes(
    source: str,
    context: ConversionContext,
    *,
    image_field: str = "image",
    prompt: str = DETECTION_PROMPT,
    from_name: str | None = None,
) -> Iterator[object]:
    """Convert rectangles and key points of Label Studio's export JSON: a record for each task, with all of them.

    A result is `{"type": "rectanglelabels", "value": {"x", "y", "width", "height", "rotation", "rectanglelabels":
    ["cat"]}}`, in percent of the image as it is shown (https://labelstud.io/tags/rectanglelabels); `rectangle` has no
    labels but those of a result of type `labels` with the same `id`. The first annotation counts that was not
    cancelled. A rectangle that is rotated, or drawn onto a rotated image, makes its task a bad record.

    Args:
        source: the export.
        context: of the conversion.
        image_field: the field of a task's data that has the image.
        prompt: what is asked.
        from_name: the control whose results count; None: those of all controls.
    """

    def make_record(value: object) -> Record | None:
        """Make the record of a task; None if the task is left out."""
        task = convert_record(value, LabelStudioTask)
        done = next((annotation for annotation in task.annotations or [] if not annotation.was_cancelled), None)
        if done is None:
            context.left_out["tasks without a completed annotation"] += 1
            return None
        results = [result for result in done.result or [] if result.type in BOX_CONTROLS]
        named = {result.id: result.value.get(LABELS) for result in done.result or [] if result.type == LABELS}
        if from_name is not None:
            results = [result for result in results if result.from_name == from_name]
        context.left_out["tasks without a box"] += not results
        if not results:
            return None
        image = task.data.get(image_field)
        if not isinstance(image, str):
            raise BadSample(
                str(task.id), f"`{image_field}` must be a string of its data, which has {', '.join(task.data)}"
            )
        objects = [_studio_object(result, named.get(result.id), str(task.id)) for result in results]
        image = resolve_local_image_name(image, context.folder)
        return make_detection_record(str(task.id), image, objects, prompt, "<objects>")

    return convert_records(make_record, source, context)


def has_boxes_alone(task: Record) -> bool:
    """Return whether a task of Label Studio's has rectangles or key points as results, and no others but labels."""
    annotations = task.get("annotations")
    if not isinstance(annotations, list) or not isinstance(task.get("data"), dict):
        return False
    results = [item.get("result") for item in annotations if isinstance(item, dict)]
    types = [
        item.get("type") for found in results if isinstance(found, list) for item in found if isinstance(item, dict)
    ]
    return not set(types).isdisjoint(BOX_CONTROLS) and set(types) <= {*BOX_CONTROLS, LABELS}


def _studio_object(result: Result, named: object, sample_id: str) -> Record:
    """Return the box or point of a result, which has the labels `named` if it has none of its own."""
    control, value = result.type, result.value
    numbers = {name: value.get(name, 0) for name in ("x", "y", "width", "height", "rotation")}
    for name, number in numbers.items():
        if not isinstance(number, int | float):
            raise BadSample(sample_id, f"`{name}` of a {control} must be a number, got {number!r:.40}")
    if numbers["rotation"] % 360:
        raise BadSample(sample_id, f"a rectangle is rotated by {numbers['rotation']:g}°; boxes here are upright")
    if result.image_rotation % 360:
        raise BadSample(sample_id, f"its image was rotated by {result.image_rotation:g}° there; rotate its file")
    labels = value.get(control) or named
    label = {"label": ", ".join(map(str, labels))} if isinstance(labels, list) and labels else {}
    percent = corners(*(float(numbers[name]) for name in ("x", "y", "width", "height")))
    shares = [round(min(max(number / 100, 0.0), 1.0), 6) for number in percent]
    place = {"point": shares[:2]} if control.startswith("keypoint") else {"box": shares}
    return {**label, **place, "units": "share"}
