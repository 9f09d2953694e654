"""Questions of the probe: the same every time, different from each other, not to be answered by one word."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vlm.evaluation.probe.abilities import ABILITIES
from vlm.evaluation.probe.drawing import BACKGROUND, COLOURS, SIDE, Shape, draw_shapes
from vlm.evaluation.probe.grading import Check, grade
from vlm.evaluation.probe.write import write_probe


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("probe")
    lines = [json.loads(line) for line in write_probe(folder, 12).read_text().splitlines()]
    assert all((folder / line["image"]).is_file() for line in lines if "image" in line)
    return lines


def answer_of(record: dict) -> str:
    return record["conversations"][1]["value"]


def right_share(answer: str, records: list[dict]) -> float:
    return sum(grade(answer, Check.from_record(record["check"])) for record in records) / len(records)


def test_every_reference_is_right(records: list[dict]):
    assert Counter(record["kind"] for record in records) == dict.fromkeys(ABILITIES, 12)
    assert [record["id"] for record in records if not right_share(answer_of(record), [record])] == []


@pytest.mark.parametrize("ability", ABILITIES)
def test_no_constant_answer_passes(records: list[dict], ability: str):
    own = [record for record in records if record["kind"] == ability]
    assert max(right_share(answer_of(record), own) for record in own) <= 0.7
    assert right_share("", own) == right_share("Unclear.", own) == 0


def test_the_probe_is_the_same_every_time(records: list[dict], tmp_path: Path):
    again = [json.loads(line) for line in write_probe(tmp_path, 2).read_text().splitlines()]
    assert again == [record for record in records if int(record["id"][-3:]) < 2], "fewer questions are the first ones"


def test_shapes_are_where_they_are_said_to_be():
    image = draw_shapes([Shape("star", "red", 0.25, 0.75), Shape("circle", "blue", 0.75, 0.25)])
    assert image.getpixel((SIDE // 4, 3 * SIDE // 4)) == COLOURS["red"]
    assert image.getpixel((3 * SIDE // 4, SIDE // 4)) == COLOURS["blue"]
    assert image.getpixel((SIDE // 4, SIDE // 4)) == BACKGROUND


def test_a_counted_number_is_drawn(records: list[dict], tmp_path: Path):
    """The pixels of the shapes' colours grow with the number of shapes."""
    write_probe(tmp_path, 12)
    areas: dict[tuple[str, int], list[int]] = {}
    for record in (record for record in records if record["kind"] == "counting"):
        shape = record["conversations"][0]["value"].split()[3]
        pixels = Image.open(tmp_path / record["image"]).get_flattened_data()
        areas.setdefault((shape, int(answer_of(record))), []).append(sum(pixel in COLOURS.values() for pixel in pixels))
    for (shape, number), found in areas.items():
        for (other_shape, other), others in areas.items():
            if shape == other_shape and number < other:
                assert max(found) < min(others)
