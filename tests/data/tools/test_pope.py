"""Questions about labelled objects: balanced, absent ones chosen as each strategy says; requests for captions."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.command_line import refusal
from vlm.cli.main import main
from vlm.data.tools.labelled_images import LabelledImage, read_labelled_images
from vlm.data.tools.pope import STRATEGIES, make_questions, with_article

SHOWN = {
    "a.png": ["dog", "person"], "b.png": ["dog", "person"], "c.png": ["dog", "ball"], "d.png": ["person", "car"],
    "e.png": ["person", "car"], "f.png": ["person"], "g.png": ["ball"],
}  # fmt: skip
IMAGES = [LabelledImage(name, tuple(labels)) for name, labels in SHOWN.items()]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Objects as labels, as mappings and as ms-swift's; an image in two records, one without objects."""
    lines = [
        {"image": "a.png", "objects": ["Dog", "person"]},
        {"image": "a.png", "objects": [{"label": "traffic_light", "box": [0, 0, 1, 1]}]},
        {"images": ["b.png"], "objects": {"ref": ["puppy"], "bbox": [[0, 0, 1, 1]]}},
        {"image": "c.png"},
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "synonyms.txt").write_text("dog, puppy, hound\n\nperson, man\n")
    return tmp_path / "records.jsonl"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_of_the_questions_are_about_what_is_there(strategy: str):
    made = make_questions(IMAGES, strategy, num_objects=2)
    assert made == make_questions(IMAGES, strategy, num_objects=2)
    for record in made:
        is_there = record["object"] in SHOWN[record["image"]]
        assert record["conversations"][1]["value"] == ("yes" if is_there else "no")
        assert record["kind"] == ("present" if is_there else strategy)
    assert Counter(record["conversations"][1]["value"] for record in made) == {"yes": 12, "no": 12}
    assert len({record["id"] for record in made}) == len(made)


def absent(strategy: str, image: str) -> list[str]:
    """The absent objects that an image is asked about, in order."""
    made = make_questions(IMAGES, strategy, num_objects=1)
    return [record["object"] for record in made if record["image"] == image and record["kind"] == strategy]


def test_absent_objects_are_chosen_as_each_strategy_says():
    assert absent("popular", "g.png") == ["person"], "it is in most images"
    assert absent("adversarial", "g.png") == ["dog"], "it stands beside a ball"
    assert absent("adversarial", "d.png") == ["dog"], "it stands beside a person twice"
    assert absent("popular", "f.png") == ["dog"]
    assert absent("random", "f.png")[0] in ("dog", "ball", "car")


def test_labels_are_joined_by_image(records: Path, tmp_path: Path):
    images = read_labelled_images(str(records), tmp_path, synonyms={"puppy": "dog"})
    found = {image.image: image.labels for image in images}
    assert found == {"a.png": ("dog", "person", "traffic light"), "b.png": ("dog",), "c.png": ()}
    assert with_article("orange") == "an orange"


def test_the_commands_write_records(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [str(records), str(tmp_path / "pope"), "--synonyms", str(records.with_name("synonyms.txt"))]
    main(["data", "pope", *words, "--question", "Do you see {object}?"])
    assert capsys.readouterr().out.count("questions: ") == 3
    first = json.loads((tmp_path / "pope" / "adversarial.jsonl").read_text().splitlines()[0])
    assert first["conversations"][0]["value"].startswith("<image>\nDo you see a ")
    assert refusal("data", "pope", *words).startswith("vlm data pope: ")
    output = tmp_path / "chair.jsonl"
    main(["data", "chair", str(records), str(output), "--synonyms", words[-1]])
    answers = {(line := json.loads(text))["image"]: line["answers"] for text in output.read_text().splitlines()}
    assert answers == {"a.png": ["dog|puppy|hound", "person|man", "traffic light"], "b.png": ["dog|puppy|hound"]}


def test_what_cannot_be_read_is_refused(records: Path, tmp_path: Path):
    def refused(line: object, *words: str) -> str:
        (tmp_path / "bad.jsonl").write_text(json.dumps(line))
        return refusal("data", "chair", str(tmp_path / "bad.jsonl"), str(tmp_path / "out.jsonl"), *words)

    assert "`objects[0]` has no label (label, name, category)" in refused({"image": "a.png", "objects": [{"box": 1}]})
    assert "one image file is needed, as `image`" in refused({"objects": ["dog"]})
    assert "name their key with --objects-key" in refused({"image": "a.png", "labels": ["dog"]})
    (tmp_path / "twice.txt").write_text("dog, pup\nseal, pup\n")
    said = refused({"image": "a.png", "objects": ["dog"]}, "--synonyms", str(tmp_path / "twice.txt"))
    assert "'pup' is a synonym of 'dog' and of 'seal'" in said
