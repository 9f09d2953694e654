"""Objects of records: our own form, ms-swift's, and the marks in texts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vlm.data.objects import MarkedObject, turn_upright
from vlm.data.records.conversations import read_llava, read_messages
from vlm.data.records.formats import get_reader
from vlm.data.sample import BadSample, Sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (200, 100)).save(tmp_path / name)
    (tmp_path / "a.mp4").touch()
    return tmp_path


def read(folder: Path, objects: object, answer: str, question: str = "<image>\nWhere?", **keys: object) -> Sample:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return read_llava({"id": "1", "image": "a.png", "objects": objects, "conversations": turns, **keys}, folder)


def texts(sample: Sample) -> list[str]:
    return ["".join(part for part in turn.content if isinstance(part, str)).strip() for turn in sample.turns]


CAT, DOG = {"label": "cat", "box": [1, 2, 3, 4]}, {"label": "dog", "box": [5, 6, 7, 8]}


def test_marks_get_the_numbers_of_their_objects(folder: Path):
    sample = read(folder, [CAT, DOG], "<bbox> and <bbox>", "<image>\nThe <ref-object> and the <ref-object>?")
    assert texts(sample) == ["The <ref-object:0> and the <ref-object:1>?", "<bbox:0> and <bbox:1>"]
    assert sample.objects == (
        MarkedObject("box", (1, 2, 3, 4), "cat"), MarkedObject("box", (5, 6, 7, 8), "dog")
    )  # fmt: skip
    assert texts(read(folder, [CAT, DOG], "<objects>"))[1] == "<objects:0,1>"
    assert texts(read(folder, [CAT, DOG], "<objects:1>", "<image>\n<bbox:0>?")) == ["<bbox:0>?", "<objects:1>"]


def test_points_spans_and_other_images(folder: Path):
    objects = [
        {"label": "nose", "point": [0.5, 0.25], "units": "share", "image": 1},
        {"span": [1, 2.5], "label": None, "units": None},  # rows of a table have every key
        {"box": [1, 2, 3, 4], "upright": False},
    ]
    turns = [{"role": "user", "content": "<image><image><video> Where?"}, {"role": "assistant", "content": "<objects>"}]
    record = {"id": "1", "images": ["a.png", "b.png"], "videos": ["a.mp4"], "objects": objects, "messages": turns}
    assert read_messages(record, folder).objects == (
        MarkedObject("point", (0.5, 0.25), "nose", 1, "share"), MarkedObject("span", (1, 2.5)),
        MarkedObject("box", (1, 2, 3, 4), upright=False),
    )  # fmt: skip


def test_objects_are_written_as_they_are_read(folder: Path):
    objects = [CAT, {"point": [1.5, 2], "units": "share", "upright": False}, {"label": "sky"}]
    sample = read(folder, objects, "<objects> under the <ref-object:2>")
    assert [marked.as_record() for marked in sample.objects] == objects
    assert json.loads(json.dumps(objects)) == objects


def test_swifts_form(folder: Path):
    swift = {"ref": ["a dog", "a woman"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]}
    sample = read(folder, swift, "<ref-object><bbox> and <ref-object><bbox> play")
    assert texts(sample)[1] == "<ref-object:0><bbox:0> and <ref-object:1><bbox:1> play"
    assert [marked.label for marked in sample.objects] == ["a dog", "a woman"]
    swift = {"ref": ["sheep"], "bbox": [[90.9, 16, 135, 21], [36, 48, 49, 53]], "bbox_type": "norm1000"}
    sample = read(folder, swift, "<bbox><bbox>", "<image>\nFind the <ref-object>")
    assert texts(sample) == ["Find the <ref-object:0>", "<bbox:0><bbox:1>"]
    assert {(marked.label, marked.units) for marked in sample.objects} == {("sheep", "thousandths")}
    click = {"ref": [], "bbox": [[0.1, 0.2]], "bbox_type": "norm1"}
    (point,) = read(folder, click, "Action: click(start_box='<bbox>')").objects
    assert point == MarkedObject("point", (0.1, 0.2), units="share")
    named = read(folder, {"ref": ["cat"], "bbox": []}, "A <ref-object>.")
    assert named.objects == (MarkedObject("name", label="cat"),)
    several = read(
        folder, {"bbox": [[1, 2, 3, 4]], "image_id": [1]}, "<bbox>", "<image><image>\nWhere?",
        image=None, images=["a.png", "b.png"],
    )  # fmt: skip
    assert several.objects[0].medium == 1


@pytest.mark.parametrize(
    ("objects", "answer", "words"),
    [
        ("a", "<bbox>", "`objects` must be a list of mappings"),
        (["a"], "<bbox>", "`objects[0]` must be a mapping"),
        ([{"label": "a", "mask": [1]}], "<bbox>", "`objects[0].mask`: allowed are label, box"),
        ([{"box": [1, 2, 3, 4], "point": [1, 2]}], "<bbox>", "one of box, point and span, got box and point"),
        ([{"units": "share"}], "<bbox>", "one of box, point and span"),
        ([{**CAT, "label": 3}], "<bbox>", "`objects[0].label` must be a string"),
        ([{**CAT, "units": "cm"}], "<bbox>", "allowed are pixels, share, thousandths"),
        ([{**CAT, "upright": "no"}], "<bbox>", "must be true or false"),
        ([{**CAT, "image": 1}], "<bbox>", "objects[0] is of image 1, but the record shows 1 image, counted from 0"),
        ([{**CAT, "image": -1}], "<bbox>", "must be a whole number from 0, got -1"),
        ([{"span": [1, 2]}], "<bbox>", "is of video 0, but the record shows no videos"),
        ([{"box": [1, 2, 3]}], "<bbox>", "must be [x1, y1, x2, y2], got [1, 2, 3]"),
        ([{"box": [1, 2, 3, "4"]}], "<bbox>", "must be [x1, y1, x2, y2]"),
        ([{"box": [10, 2, 3, 4]}], "<bbox>", "ends before it begins: write [x1, y1, x2, y2], not a width"),
        ([{"span": [3, 1]}], "<bbox>", "a span ends before it begins"),
        ([CAT], "no", "objects[0] does not occur in its text; write <bbox> for each, or <objects>"),
        ([CAT], "<bbox><bbox>", "more <bbox> than `objects` has boxes"),
        ([CAT], "<bbox><ref-object><ref-object>", "more <ref-object> than `objects` has labels"),
        ([CAT], "<bbox:1>", "<bbox:1>, but the record has 1 objects, counted from 0"),
        ([CAT, DOG], "<bbox:0,1>", "it stands for one object"),
        ([{"label": "sky"}], "<objects>", "no object has a place"),
        ([{"label": "sky"}], "<bbox:0>", "objects[0] has no box, point or span"),
        ([{"box": [1, 2, 3, 4]}], "<bbox><ref-object:0>", "objects[0] has no label"),
        ({"bbox": [[1, 2, 3, 4]], "categories": [1]}, "<bbox>", "`objects.categories`: as a mapping"),
        ({"bbox": [[1, 2, 3, 4]], "bbox_type": "cm"}, "<bbox>", "allowed are real, norm1, norm1000"),
        ({"bbox": [[1, 2, 3, 4]], "ref": [1]}, "<bbox>", "`objects.ref` must be a list of strings"),
        ({"bbox": [[1, 2, 3, 4]], "image_id": [0, 0]}, "<bbox>", "2 numbers for 1 boxes"),
        ({"bbox": [[1, 2, 3, 4]], "ref": ["a"]}, "<bbox>", "'a' of `objects.ref` does not occur"),
        ({"bbox": [], "ref": ["a"]}, "<ref-object><ref-object>", "more <ref-object> than `objects.ref`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(objects: object, answer: str, words: str, folder: Path):
    with pytest.raises(BadSample) as caught:
        read(folder, objects, answer)
    assert words in str(caught.value)


def test_marks_are_words_without_objects(folder: Path):
    assert texts(read(folder, [], "It is <objects>"))[1] == "It is <objects>"
    with pytest.raises(BadSample, match="its text has <bbox>, but the record has no `objects`"):
        read(folder, None, "<bbox>")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("caption", {"caption": "A <ref-object> at <bbox>"}),
        ("question", {"question": "Where?", "answer": "<objects>"}),
        ("alpaca", {"instruction": "Where?", "output": "<objects>"}),
        ("cauldron", {"texts": [{"user": "Where?", "assistant": "<objects>"}]}),
        ("minicpm", {"conversations": [{"role": "user", "content": "Where?"},
                                       {"role": "assistant", "content": "<objects>"}]}),
    ],
)  # fmt: skip
def test_other_formats_have_objects_too(name: str, record: dict, folder: Path):
    sample = get_reader(name)({"id": "1", "image": "a.png", "objects": [CAT], **record}, folder)
    assert sample.objects == (MarkedObject("box", (1, 2, 3, 4), "cat"),)
    assert ":0>" in texts(sample)[-1]


def test_formats_without_replies_refuse_objects(folder: Path):
    with pytest.raises(BadSample, match="`objects` is not read"):
        get_reader("labelled")({"id": "1", "image": "a.png", "prompt": "p", "label": 1, "objects": [CAT]}, folder)


def test_turning_keeps_corners_in_order():
    assert turn_upright((10, 20, 30, 40), 6, (100, 50)) == (10, 10, 30, 30)
    assert turn_upright((10, 20), 3, (100, 50)) == (90, 30)


def test_marks_in_thinking_and_in_calls(folder: Path):
    def read_agent(objects: object, arguments: dict) -> Sample:
        call = {"role": "assistant", "content": "", "reasoning_content": "It is at <bbox>.",
                "tool_calls": [{"function": {"name": "zoom", "arguments": arguments}}]}  # fmt: skip
        turns = [{"role": "user", "content": "<image>Where?"}, call, {"role": "tool", "content": "seen"},
                 {"role": "assistant", "content": "<bbox>", "reasoning_content": "so: <bbox:1>"}]  # fmt: skip
        return read_messages({"id": "1", "image": "a.png", "objects": objects, "messages": turns}, folder)

    sample = read_agent([CAT, DOG], {"box": [1, 2, 3, 4]})
    assert [turn.thinking for turn in sample.turns] == [None, "It is at <bbox:0>.", None, "so: <bbox:1>"]
    assert texts(sample)[-1] == "<bbox:1>"
    with pytest.raises(BadSample, match="<bbox> is in an argument of a call"):
        read_agent([CAT, DOG], {"box": "<bbox>"})
    turns = [{"role": "user", "content": "<image>Where?"},
             {"role": "assistant", "content": "there", "reasoning_content": "at <bbox>"}]  # fmt: skip
    with pytest.raises(BadSample, match="its text has <bbox>, but the record has no `objects`"):
        read_messages({"id": "1", "image": "a.png", "messages": turns}, folder)
