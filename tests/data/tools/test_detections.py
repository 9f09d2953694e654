"""Boxes of COCO, RefCOCO and Label Studio become records with objects."""

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from vlm.data.records.conversations import read_llava
from vlm.data.records.open import open_records
from vlm.data.tools.convert import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (200, 100)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


def convert(value: object, *words: str, name: str = "in.json") -> list[dict]:
    content = pickle.dumps(value, protocol=2) if name.endswith(".p") else json.dumps(value).encode()
    Path(name).write_bytes(content)
    main([name, "out.jsonl", "--force", *words])
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def annotation(number: int, image: int, category: int, *bbox: float, **more: object) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), "area": 1.0, "iscrowd": 0,
            "segmentation": [[1, 2, 3, 4, 5, 6]], **more}  # fmt: skip


COCO = {
    "info": {"year": 2017},
    "images": [{"id": 9, "file_name": "a.jpg", "width": 200, "height": 100, "license": 1},
               {"id": 8, "file_name": "b.jpg", "width": 200, "height": 100},
               {"id": 7, "file_name": "c.jpg", "width": 200, "height": 100}],
    "annotations": [annotation(1, 9, 17, 10.5, 20, 30.25, 40), annotation(2, 9, 18, 0, 0, 50, 50),
                    annotation(3, 9, 17, 100, 50, 100, 50), annotation(4, 8, 18, 1, 2, 3, 4),
                    annotation(5, 8, 17, 1, 2, 3, 4, iscrowd=1, segmentation={"counts": [], "size": [1, 1]})],
    "categories": [{"id": 17, "name": "cat", "supercategory": "animal"}, {"id": 18, "name": "dog"}],
}  # fmt: skip


def test_coco_detections_are_recognised(capsys):
    first, second = convert(COCO)
    assert first["image"] == "a.jpg"
    assert first["objects"] == [
        {"label": "cat", "box": [10.5, 20, 40.75, 60]}, {"label": "dog", "box": [0, 0, 50, 50]},
        {"label": "cat", "box": [100, 50, 200, 100]},
    ]  # fmt: skip
    assert first["conversations"] == [
        {"from": "human", "value": "<image>\nDetect all objects in the image."},
        {"from": "gpt", "value": "<objects:0,1,2>"},
    ]
    assert second["id"] == "8"
    said = capsys.readouterr().out
    assert "1 boxes around crowds" in said
    assert "1 images without a box" in said
    for record in (first, second):
        read_llava(record, Path())


def test_coco_detections_label_by_label():
    records = convert(COCO, "--prompt", "detect {label}", "--by-label")
    asked = [(record["id"], record["conversations"][0]["value"], len(record["objects"])) for record in records]
    assert asked == [
        ("9-0", "<image>\ndetect cat", 2),
        ("9-1", "<image>\ndetect dog", 1),
        ("8-0", "<image>\ndetect dog", 1),
    ]
    whole = convert(COCO, "--prompt", "detect {label}")
    assert whole[0]["conversations"][0]["value"] == "<image>\ndetect cat ; dog"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (annotation(1, 9, 99, 1, 2, 3, 4), "category_id=99 is none of `categories`"),
        (annotation(1, 5, 17, 1, 2, 3, 4), "image_id=5 is none of `images`"),
        (annotation(1, 9, 17, 1, 2, 3), "[x, y, width, height] is needed"),
        (annotation(1, 9, 17, 1, 2, -3, 4), "a box ends before it begins"),
    ],
)  # fmt: skip
def test_bad_boxes_are_told(bad: dict, words: str):
    with pytest.raises(SystemExit) as caught:
        convert({**COCO, "annotations": [bad]})
    assert words in str(caught.value)


REFS = [
    {"ref_id": 5, "ann_id": 1, "image_id": 9, "category_id": 17, "split": "train", "file_name": "x_1.jpg",
     "sentences": [{"sent_id": 1, "raw": "Left cat", "sent": "left  cat", "tokens": ["left", "cat"]},
                   {"sent_id": 2, "raw": "grey one", "sent": "grey one", "tokens": ["grey", "one"]}]},
    {"ref_id": 6, "ann_id": 4, "image_id": 8, "category_id": 18, "split": "testA", "sentences": [{"sent": "the dog"}]},
    {"ref_id": 7, "ann_id": 99, "image_id": 8, "category_id": 18, "split": "val", "sentences": [{"sent": "lost"}]},
]  # fmt: skip


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.json"])
def test_refcoco(name: str):
    Path("instances.json").write_text(json.dumps(COCO))
    words = ("--from", "refcoco", "--instances", "instances.json")
    records = convert(REFS, *words, name=name)
    assert [(record["id"], record["image"]) for record in records] == [("5-0", "a.jpg"), ("5-1", "a.jpg")]
    assert records[0]["objects"] == [{"label": "left cat", "box": [10.5, 20, 40.75, 60]}]
    assert [turn["value"] for turn in records[0]["conversations"]] == ["<image>\nWhere is <ref-object:0>?", "<bbox:0>"]
    (test,) = convert(REFS, *words, "--split", "testA", "--prompt", "Find {label}", name=name)
    assert test["conversations"][0]["value"] == "<image>\nFind <ref-object:0>"
    with pytest.raises(SystemExit, match="ann_id=99 is not in the file of boxes"):
        convert(REFS, *words, "--split", "val", name=name)
    with pytest.raises(SystemExit, match=r"--split test: .* has testA, train, val"):
        convert(REFS, *words, "--split", "test", name=name)


def test_a_pickle_runs_no_code():
    Path("instances.json").write_text(json.dumps(COCO))
    with pytest.raises(SystemExit, match=r"it names pathlib.*, which is not imported"):
        convert([Path("a")], "--from", "refcoco", "--instances", "instances.json", name="refs.p")


def rectangle(label: str | None = "cat", kind: str = "rectanglelabels", **more: object) -> dict:
    value = {"x": 10, "y": 20.5, "width": 30, "height": 40, "rotation": 0, **({kind: [label]} if label else {}), **more}
    return {"id": "r", "type": kind, "from_name": "box", "to_name": "image", "original_width": 200,
            "original_height": 100, "image_rotation": 0, "value": value}  # fmt: skip


def task(number: int, *results: dict, **more: object) -> dict:
    annotations = [{"id": 1, "was_cancelled": False, "result": list(results), **more}]
    return {"id": number, "data": {"image": "/data/local-files/?d=a.jpg"}, "annotations": annotations}


def test_label_studio_rectangles_are_recognised(capsys):
    point = {**rectangle("nose", "keypointlabels"), "from_name": "points"}
    point["value"] = {"x": 50, "y": 25, "width": 0.5, "keypointlabels": ["nose"]}
    plain = rectangle(None, "rectangle", x=0, y=0, width=100, height=100.0000001)
    tasks = [task(1, rectangle(), point, plain), task(2, rectangle(), was_cancelled=True), task(3)]
    (record,) = convert(tasks)
    assert (record["id"], record["image"]) == ("1", "a.jpg")
    assert record["objects"] == [
        {"label": "cat", "box": [0.1, 0.205, 0.4, 0.605], "units": "share"},
        {"label": "nose", "point": [0.5, 0.25], "units": "share"},
        {"box": [0, 0, 1, 1], "units": "share"},
    ]
    said = capsys.readouterr().out
    assert "1 tasks without a completed annotation" in said
    assert "1 tasks without a box" in said
    (record,) = convert(tasks[:1], "--from", "label-studio-boxes", "--from-name", "points", "--to", "messages")
    assert len(record["objects"]) == 1
    assert record["messages"][1]["content"] == [{"type": "text", "text": "<objects:0>"}]


def test_rotated_rectangles_are_refused():
    with pytest.raises(SystemExit, match="a rectangle is rotated by 30°; boxes here are upright"):
        convert([task(1, rectangle(rotation=30))])
    with pytest.raises(SystemExit, match="`width` of a rectanglelabels must be a number, got None"):
        convert([task(1, rectangle(width=None))])


def test_objects_survive_conversion():
    (record, _) = convert(COCO)
    Path("again.json").write_text(json.dumps([record]))
    main(["again.json", "messages.parquet", "--to", "messages", "--force"])
    main(["messages.parquet", "llava.json", "--to", "llava", "--force"])
    again = open_records("llava.json", Path("cache"))[0]
    assert again["objects"] == record["objects"]
    assert again["conversations"] == record["conversations"]


def test_label_studio_labels_of_a_control_of_their_own():
    plain = {**rectangle(None, "rectangle"), "id": "a"}
    named = {**plain, "type": "labels", "from_name": "names", "value": {**plain["value"], "labels": ["cat"]}}
    (record,) = convert([task(1, plain, named)])
    assert [item["label"] for item in record["objects"]] == ["cat"]
    (record,) = convert([task(1, plain, named)], "--from", "label-studio-boxes", "--from-name", plain["from_name"])
    assert [item["label"] for item in record["objects"]] == ["cat"]


def test_rectangles_on_rotated_images_are_refused():
    with pytest.raises(SystemExit, match="its image was rotated by 90° there; rotate its file"):
        convert([task(1, {**rectangle(), "image_rotation": 90})])
