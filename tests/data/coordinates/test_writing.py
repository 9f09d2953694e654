"""From a record to text and back to pixels, for every convention and every way in which an image is changed."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from tests.data.coordinates.test_geometry import MAKERS, composed, crops, family
from tests.tiny_parts import Parts
from vlm.data.coordinates.answers import parse_answer_to_images, parse_answer_to_sample, true_objects
from vlm.data.coordinates.geometry import make_views
from vlm.data.coordinates.table import CONVENTIONS, get_convention, use_convention
from vlm.data.coordinates.writing import view_for, write_objects
from vlm.data.objects import BOX, POINT, MarkedObject, turn_upright
from vlm.data.processor import Processor
from vlm.data.records.conversations import read_llava
from vlm.data.sample import BadSample, ImageRef, Sample, Turn

TOKENS = [
    *(token for kind in CONVENTIONS.values() for token in kind.required_tokens),
    *(f"<loc{number:04d}>" for number in range(1024)), *(f"<loc_{number}>" for number in range(1000)),
]  # fmt: skip
STORED_SIZES = [(60, 90), (90, 61), (1, 50), (400, 3), (700, 500)]
"""Heights and widths of files."""


def tiled(parts: Parts) -> Processor:
    processor = composed(parts, "square", crops())
    processor.anyres = {"grids": [[1, 2], [2, 1]], "tile_size": 16, "tokens_side": 4}
    return processor


WAYS = {
    **MAKERS,
    "composed, tiled": tiled,
    "qwen2.5-vl": lambda parts: family("qwen2.5-vl"),
    "internvl, tiled": lambda parts: family("internvl"),
}
"""Every way in which an image is changed."""


@dataclass
class Case:
    """A file, and the sample that a record about it gives."""

    folder: Path
    size: tuple[int, int]
    orientation: int = 1

    def __post_init__(self):
        exif = Image.Exif()
        exif[274] = self.orientation
        height, width = self.size
        self.image = Image.new("RGB", (width, height), (90, 90, 90))
        self.image.save(self.folder / "a.png", exif=exif)

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height."""
        return self.size if self.orientation > 4 else (self.size[1], self.size[0])

    def sample(self, objects: object, answer: str = "<objects>", question: str = "Where?") -> Sample:
        conversation = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        record = {"id": "1", "image": "a.png", "objects": objects, "conversations": conversation}
        return read_llava(json.loads(json.dumps(record)), self.folder)


def ready(name: str, convention: str, parts: Parts) -> Processor:
    processor = WAYS[name](parts)
    processor.tokenizer.add_tokens(TOKENS)
    use_convention(processor, convention, "any")
    return processor


def draw_values(chance: random.Random, kind: str, bounds: tuple[float, float]) -> list[float]:
    width, height = bounds
    x, y = sorted(chance.uniform(0, width) for _ in range(2)), sorted(chance.uniform(0, height) for _ in range(2))
    return [x[0], y[0], x[1], y[1]] if kind == BOX else [x[1], y[0]]


def answer_text(sample: Sample) -> str:
    return "".join(str(part) for part in sample.turns[-1].content)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_round_trip(way: str, convention: str, parts: Parts, tmp_path: Path):
    processor = ready(way, convention, parts)
    chance = random.Random(f"{way}{convention}")
    kinds = [POINT] if convention.startswith("molmo") else [BOX, POINT]
    if convention == "qwen2.5-vl" and not make_views(processor, [(60, 90)])[0].is_sized:
        with pytest.raises(BadSample, match="does not tell its size"):
            write_objects(Case(tmp_path, (60, 90)).sample([{"label": "cat", "box": [1, 2, 3, 4]}]), processor)
        return
    for size in STORED_SIZES:
        case = Case(tmp_path, size, orientation=chance.randint(1, 8))
        for _ in range(5):
            check_round_trip(case, processor, chance, kinds)


def check_round_trip(case: Case, processor: Processor, chance: random.Random, kinds: list[str]) -> None:
    """Write one drawn object, and read it again: within a step of the convention, where it is not cut off."""
    convention = get_convention(str(processor.coordinates))
    width, height = case.upright
    view = view_for(convention, make_views(processor, [(height, width)])[0])
    upright = chance.random() < 0.5
    bounds = case.upright if upright else (case.size[1], case.size[0])
    units = chance.choice(["pixels", "share", "thousandths"])
    kind = chance.choice(kinds)
    values = draw_values(chance, kind, bounds)
    sides = {"pixels": (1, 1), "share": bounds, "thousandths": [side / 1000 for side in bounds]}[units]
    given = [value / sides[index % 2] for index, value in enumerate(values)]
    record = {"label": "a cat", kind: given, "units": units, "upright": upright}
    true = turn_upright(tuple(values), 1 if upright else case.orientation, (case.size[1], case.size[0]))
    seen = view.to_pixels(tuple(min(max(share, 0.0), 1.0) for share in view.to_shares(true)))
    is_cropped = any(abs(a - b) > 1e-6 for a, b in zip(seen, true, strict=True))
    if is_cropped and (kind == POINT or seen[0] == seen[2] or seen[1] == seen[3]):
        with pytest.raises(BadSample, match="cuts out"):
            write_objects(case.sample([record]), processor)
        return
    sample = write_objects(case.sample([record]), processor)
    assert "<objects" not in answer_text(sample)
    assert true_objects(sample)[0].values == pytest.approx(true)
    (found,) = parse_answer_to_images(answer_text(sample), processor, [(height, width)])
    assert (found.kind, found.label, found.units) == (kind, "a cat", "pixels")
    steps = [
        step * side / scale
        for step, side, scale in zip(convention.resolution(view.seen_size), view.seen_size, view.scale, strict=True)
    ]
    for index, (a, b) in enumerate(zip(found.values, seen, strict=True)):
        assert abs(a - b) <= steps[index % 2] * 1.001 + 1e-6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_stored_images_turn_as_pillow_turns_them(orientation: int, tmp_path: Path):
    case = Case(tmp_path, (40, 70), orientation)
    box = (10, 5, 30, 15)
    with Image.open(tmp_path / "a.png") as image:
        image.paste((255, 255, 255), box)
        painted = ImageOps.exif_transpose(image)
    assert painted.size == case.upright
    assert painted.convert("L").point(lambda level: 255 * (level > 128)).getbbox() == turn_upright(
        box, orientation, (70, 40)
    )


def written(case: Case, processor: Processor, objects: object, answer: str, question: str = "Where?") -> list[str]:
    sample = write_objects(case.sample(objects, answer, question), processor)
    return ["".join(part for part in turn.content if isinstance(part, str)).strip() for turn in sample.turns]


def test_texts_become_what_the_model_writes(parts: Parts, tmp_path: Path):
    case, processor = Case(tmp_path, (100, 200)), ready("qwen2.5-vl", "qwen2-vl", parts)
    swift = {"ref": ["a dog", "a woman"], "bbox": [[20, 10, 40, 50], [100, 0, 200, 100]]}
    ours = [{"label": "a dog", "box": [20, 10, 40, 50]}, {"label": "a woman", "box": [0.5, 0, 1, 1], "units": "share"}]
    dog = "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(100,100),(200,500)<|box_end|>"
    woman = "<|object_ref_start|>a woman<|object_ref_end|><|box_start|>(500,0),(999,999)<|box_end|>"
    for objects in (swift, ours):
        texts = written(case, processor, objects, "<ref-object><bbox> and <ref-object><bbox> play.")
        assert texts == ["Where?", f"{dog} and {woman} play."]
    assert written(case, processor, ours, "<objects>") == ["Where?", dog + woman]
    by_number = written(case, processor, ours, "<objects:1>", "Not <bbox:0>, but the <ref-object:1>?")
    assert by_number == [
        "Not <|box_start|>(100,100),(200,500)<|box_end|>, but the <|object_ref_start|>a woman<|object_ref_end|>?", woman
    ]  # fmt: skip


def test_the_answer_has_the_objects_of_the_last_reply(parts: Parts, tmp_path: Path):
    case, processor = Case(tmp_path, (100, 200)), ready("composed, squashed", "llava", parts)
    objects = [{"label": "a dog", "box": [20, 10, 40, 50]}, {"label": "a cat", "point": [100, 100]}]
    sample = write_objects(case.sample(objects, "<bbox:1>", "Is it at <bbox:0>?"), processor)
    assert [marked.label for marked in true_objects(sample)] == ["a cat"]
    assert write_objects(replace(sample, objects=()), processor).turns == sample.turns


def test_time_spans_need_no_size(parts: Parts, tmp_path: Path):
    processor = ready("internvl, tiled", "qwen2.5-vl", parts)
    (tmp_path / "a.mp4").touch()
    turns = [{"from": "human", "value": "<video>\nWhen?"}, {"from": "gpt", "value": "<bbox>"}]
    record = {"id": "1", "video": "a.mp4", "objects": [{"label": "jump", "span": [1, 2.5]}], "conversations": turns}
    sample = write_objects(read_llava(record, tmp_path), processor)
    assert answer_text(sample) == "1.0 - 2.5 seconds"
    (found,) = parse_answer_to_sample(answer_text(sample), processor, sample)
    assert (found.kind, found.values) == ("span", (1.0, 2.5))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"box": [10, 10, 202, 20]}, "box [10, 10, 202, 20] is outside its image, which has 200×100 pixels"),
        ({"point": [-2, 5]}, "point [-2, 5] is outside"),
        ({"box": [0.5, 0.5, 1.1, 1], "units": "share"}, "is outside its image"),
    ],
)  # fmt: skip
def test_objects_outside_their_image_are_refused(place: dict, words: str, parts: Parts, tmp_path: Path):
    case, processor = Case(tmp_path, (100, 200)), ready("composed, squashed", "llava", parts)
    with pytest.raises(BadSample) as caught:
        write_objects(case.sample([{"label": "cat", **place}]), processor)
    assert words in str(caught.value)
    inside = write_objects(case.sample([{"label": "cat", "box": [10, 10, 200.6, 100]}]), processor)
    assert inside.objects[0].values == (10, 10, 200, 100)  # a rounded width


def test_what_the_crop_cuts_off_is_refused(parts: Parts, tmp_path: Path):
    case, processor = Case(tmp_path, (100, 300)), ready("composed, cropped", "llava", parts)
    with pytest.raises(BadSample, match="lies outside the middle"):
        write_objects(case.sample([{"label": "cat", "box": [10, 10, 90, 20]}]), processor)
    partly = write_objects(case.sample([{"label": "cat", "box": [10, 0, 150, 100]}]), processor)
    assert answer_text(partly) == "cat: [0.00, 0.00, 0.50, 1.00]"


def test_a_tokenizer_without_the_tokens_is_refused(parts: Parts, tmp_path: Path):
    processor = family("internvl")
    use_convention(processor, "auto", "internvl")
    assert processor.coordinates == "internvl"
    with pytest.raises(BadSample, match="the tokenizer does not have <ref> as one token"):
        write_objects(Case(tmp_path, (100, 300)).sample([{"label": "cat", "box": [10, 10, 90, 20]}]), processor)
    with pytest.raises(ValueError, match=r"add its tokens with model\.language_model\.new_tokens"):
        use_convention(processor, "glm", "internvl")


def test_an_image_that_the_processor_refuses_is_a_bad_sample(tmp_path: Path):
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.png")
    turns = (Turn("user", (ImageRef(tmp_path / "thin.png"), "?")), Turn("assistant", ("<bbox:0>",)))
    sample = Sample("thin", turns, objects=(MarkedObject("box", (0, 1, 1, 2)),))
    processor = family("qwen2-vl")
    use_convention(processor, "pixels", "any")
    with pytest.raises(BadSample, match=r"the processor refuses it: .*aspect ratio"):
        write_objects(sample, processor)
