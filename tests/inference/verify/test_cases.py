"""Questions: the same at every call, of every kind, and as a plain client writes them."""

import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from tests.inference.verify.conftest import Served
from vlm.config.dataset_schema import SourceConfig
from vlm.data.sample import ImageRef, Turn
from vlm.inference.batch import prompt_source
from vlm.inference.verify.cases import Case, make_cases, read_cases


def test_made_questions_are_the_same_and_of_every_kind():
    cases = make_cases(20)
    assert cases == make_cases(20)
    assert len({case.name for case in cases}) == 20
    assert sorted({len(case.images) for case in cases}) == [0, 1, 2, 3]
    assert {len(case.turns) for case in cases} == {1, 3}
    images = [image for case in cases for image in case.images]
    assert len(set(images)) == len(images)


def test_a_client_writes_no_line_break_between_images_and_text():
    image = ImageRef(content=b"file")
    case = Case("a", (Turn("user", (image, image, "\nWhat?")), Turn("assistant", ("A",)), Turn("user", ("\nB",))))
    assert case.images == [b"file", b"file"]
    kept = replace(case, writes_line_breaks=True).messages
    assert kept[0]["content"][-1] == {"type": "text", "text": "\nWhat?"}
    assert kept[1:] == case.messages[1:]
    assert case.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
        {"role": "user", "content": [{"type": "text", "text": "\nB"}]},
    ]


def test_records_become_questions_up_to_their_last_reply(served: Served, tmp_path: Path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    records = [
        {"image": "a.png", "conversations": turns},
        {"image": "none.png", "conversations": turns},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"image": "a.png", "conversations": turns},
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    source = prompt_source(
        served.model.model, served.model.processor, SourceConfig(path=str(tmp_path / "records.json")),
        cache=tmp_path / "cache", max_frames=1,
    )  # fmt: skip
    cases, left_out = read_cases(source, 2)
    assert [case.name for case in cases] == ["data-00000", "data-00002"]
    assert cases[0].images == [(tmp_path / "a.png").read_bytes()]
    assert [turn.role for turn in cases[1].turns] == ["user"]
    assert len(left_out) == 1
    assert "none.png does not exist" in left_out[0]
