"""Answers as text and as objects: tokens of coordinates are kept, and are tokens wherever they are spelled."""

from pathlib import Path

import pytest
from PIL import Image

from tests.data.coordinates.test_geometry import composed, crops, family, squashes
from tests.tiny_parts import Parts
from vlm.data.coordinates.answers import (
    decode_answer,
    parse_answer,
    parse_answer_to_images,
    parse_answer_to_sample,
    true_objects_of_reply,
)
from vlm.data.coordinates.geometry import ImageView
from vlm.data.coordinates.table import CONVENTIONS, use_convention
from vlm.data.objects import MarkedObject
from vlm.data.processor import Processor
from vlm.data.sample import ImageRef, Sample, Turn
from vlm.evaluation.object_metrics import OBJECT_METRICS, ObjectAnswer, pair_value

BOX = "<|box_start|>(100,200),(300,400)<|box_end|>"
TOKENS = list(CONVENTIONS["qwen2-vl"].required_tokens)


def with_tokens(processor: Processor, convention: str) -> Processor:
    processor.tokenizer.add_special_tokens({"additional_special_tokens": TOKENS}, replace_extra_special_tokens=False)
    use_convention(processor, convention, "any")
    return processor


@pytest.mark.parametrize("kind", ["family", "composed"])
def test_tokens_of_coordinates_are_tokens_in_the_texts_of_users(kind: str, parts: Parts):
    for convention, is_token in (("qwen2-vl", True), ("llava", False)):
        processor = family("qwen2-vl") if kind == "family" else composed(parts, "square", squashes())
        processor.tokenizer.add_special_tokens(
            {"additional_special_tokens": TOKENS}, replace_extra_special_tokens=False
        )
        processor = family_again(processor) if kind == "family" else composed_again(processor)
        use_convention(processor, convention, "any")
        text = f"see {BOX}"
        ids, spans = processor.tokenize(text, [(0, len(text))])
        start = processor.tokenizer.convert_tokens_to_ids("<|box_start|>")
        assert (start in ids) == is_token
        assert all(text[a:b] for a, b in spans)


def family_again(processor: Processor) -> Processor:
    from vlm.families.processing import FamilyProcessor

    assert isinstance(processor, FamilyProcessor)
    return FamilyProcessor(processor.native, processor.family)


def composed_again(processor: Processor) -> Processor:
    from vlm.models.processing_vlm import VLMProcessor

    assert isinstance(processor, VLMProcessor)
    return VLMProcessor(processor.image_processor, processor.tokenizer, processor.chat_template)


def test_answers_keep_the_tokens_of_coordinates():
    processor = with_tokens(family("qwen2-vl"), "qwen2-vl")
    ids = [*processor.tokenizer.encode(f"a cat {BOX}"), processor.tokenizer.eos_token_id]
    assert decode_answer(processor, ids) == f"a cat {BOX}"
    use_convention(processor, "llava", "any")
    assert decode_answer(processor, ids) == "a cat (100,200),(300,400)"


def test_the_convention_is_saved_with_the_processor(tmp_path: Path, parts: Parts):
    from vlm.families.processing import load_family_processor
    from vlm.models.processing_vlm import VLMProcessor

    processor = with_tokens(family("qwen2-vl"), "qwen2-vl")
    processor.save_pretrained(tmp_path / "family")
    again = load_family_processor(str(tmp_path / "family"), processor.family)
    assert again.coordinates == "qwen2-vl"
    assert again.coordinate_tokens is not None
    made = composed(parts, "square", squashes())
    use_convention(made, "pixels", "vlm")
    made.save_pretrained(tmp_path / "composed")
    assert VLMProcessor.from_pretrained(tmp_path / "composed").coordinates == "pixels"


def test_a_processor_keeps_its_convention_unless_another_is_asked_for(parts: Parts):
    processor = composed(parts, "square", squashes())
    use_convention(processor, "auto", "vlm")
    assert processor.coordinates == "llava"
    use_convention(processor, "pixels", "vlm")
    use_convention(processor, "auto", "qwen3_vl")
    assert processor.coordinates == "pixels"


def test_answers_are_in_pixels_of_the_stored_image():
    view = ImageView(640, 480, 64, 64, scale=(0.1, 0.1), offset=(0, 8))  # padded to a square
    (cat,) = parse_answer("cat: [0.50, 0.50, 1.00, 0.75]", "llava", [view] * 3, image=2)
    assert cat == MarkedObject("box", (320, 240, 640, 400), "cat", 2)
    assert parse_answer("[320, 240, 640, 400]", "pixels", [view])[0].values == (320, 240, 640, 400)
    assert parse_answer("[1, 2, 3, 4]", "qwen2.5-vl", [ImageView(9, 9, 9, 9, is_sized=False)]) == []
    assert [found.kind for found in parse_answer("[1, 2, 3, 4] 1.0 - 2.0 s", "pixels", [])] == ["span"]


def test_the_image_of_an_answer(parts: Parts, tmp_path: Path):
    processor = composed(parts, "square", squashes())
    use_convention(processor, "llava", "vlm")
    refs = []
    for name, size in (("a.png", (10, 10)), ("b.png", (100, 100))):
        Image.new("RGB", size).save(tmp_path / name)
        refs.append(ImageRef(tmp_path / name))
    turns = (Turn("user", (*refs, "where?")), Turn("assistant", ("[0.10, 0.10, 0.20, 0.20]",)))
    sample = Sample("1", turns)
    (found,) = true_objects_of_reply(sample, processor)  # its text tells where
    assert (found.medium, found.values) == (0, (1, 1, 2, 2))
    marked = Sample("1", turns, objects=(MarkedObject("box", (1, 1, 2, 2), medium=1, is_answer=True),))
    (found,) = parse_answer_to_sample("[0.10, 0.10, 0.20, 0.20]", processor, marked)
    assert (found.medium, found.values) == (1, (10, 10, 20, 20))
    assert true_objects_of_reply(marked, processor) == list(marked.objects)
    assert parse_answer_to_images("[0.1, 0.1]", processor, []) == []


@pytest.mark.parametrize(
    ("convention", "text"),
    [("llava", "[0.00, 0.25, 0.50, 0.75]"), ("pixels", "[10, 15, 60, 45] and [0, 0, 9, 9]")],
)
def test_only_what_is_seen_is_compared(parts: Parts, tmp_path: Path, convention: str, text: str):
    """Of an image of 120 x 60 pixels the middle is seen, from x = 30 to 90."""
    processor = composed(parts, "square", crops())
    use_convention(processor, convention, "vlm")
    Image.new("RGB", (120, 60)).save(tmp_path / "a.png")
    turns = (Turn("user", (ImageRef(tmp_path / "a.png"), "where?")), Turn("assistant", ("there",)))
    boxes = ((10.0, 15.0, 60.0, 45.0), (95.0, 0.0, 110.0, 60.0))  # cut in part, and not seen
    points = ((45.0, 30.0), (5.0, 30.0))
    sample = Sample("1", turns, objects=(
        *(MarkedObject("box", box, is_answer=True) for box in boxes),
        *(MarkedObject("point", point, is_answer=True) for point in points),
    ))  # fmt: skip
    true = true_objects_of_reply(sample, processor)
    assert [marked.values for marked in true] == [pytest.approx((30, 15, 60, 45)), (45, 30)]
    found = parse_answer_to_sample(text, processor, sample)
    assert [marked.values for marked in found] == [pytest.approx((30, 15, 60, 45))]
    assert pair_value(OBJECT_METRICS["iou"], ObjectAnswer(found, true[:1])) == pytest.approx(1)


def test_thinking_tells_no_objects(parts: Parts, tmp_path: Path):
    processor = composed(parts, "square", squashes())
    use_convention(processor, "llava", "vlm")
    text = "<think>at [0.50, 0.50, 0.60, 0.60]?</think>\n\n[0.10, 0.10, 0.20, 0.20]"
    (found,) = parse_answer_to_images(text, processor, [(100, 100)])
    assert found.values == (10, 10, 20, 20)
    assert parse_answer_to_images("<think>at [0.50, 0.50, 0.60, 0.60]", processor, [(100, 100)]) == []


def test_an_answer_may_tell_its_images():
    views = [ImageView(100, 100, 100, 100), ImageView(1000, 500, 1000, 500)]
    found = parse_answer('<points coords="1 1 500 500;2 2 500 500;3 3 500 500">a</points>', "molmo2", views)
    assert [(marked.medium, marked.values) for marked in found] == [(0, (50, 50)), (1, (500, 250))]
