"""A look at a few keys says which records have images and videos, as reading them does."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vlm.config.dataset_schema import SourceConfig
from vlm.data.records.conversations import read_llava
from vlm.data.records.index import IndexedRecords
from vlm.data.records.listed_media import can_look_for_media, find_listed_media
from vlm.data.sample import BadSample

MARKED, PLAIN = "<image>\nWhat is it?", "What is <image> in HTML?"
LISTED = (
    {"image": "a.png"}, {"image": ["a.png"]}, {"images": ["a.png"]}, {"image": None, "images": ["a.png"]},
    {"image": ["a.png", "a.png"]}, {}, {"image": None}, {"image": []}, {"images": []}, {"image": ""}, {"image": [None]},
    {"image": {"path": "a.png"}}, {"image": {"bytes": None, "path": None}}, {"image": False}, {"image": 1},
    {"video": "a.png"}, {"video": None, "videos": []}, {"image": [""]}, {"image": "a.png", "images": "b.png"},
    {"other": "a.png"}, {"image": "a.png", "n": float("nan")}, {"image": "missing.png"},
)  # fmt: skip
"""What records may say of their images."""


def test_records_that_can_be_used_have_media_where_they_list_some(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    records = [
        {"id": "1", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}], **listed}
        for listed in LISTED
        for text in (MARKED, PLAIN, MARKED + MARKED)
    ]
    (tmp_path / "records.json").write_text(json.dumps([*records, [1], "text"]))
    found = find_listed_media(IndexedRecords(tmp_path / "records.json", tmp_path / "cache"))
    assert len(found) == len(records) + 2
    num_used = 0
    for record, has_media in zip(records, found.tolist(), strict=False):
        try:
            sample = read_llava(record, tmp_path)
        except BadSample:
            continue
        num_used += 1
        assert bool(sample.media) is has_media, record
    assert num_used > 10


@pytest.mark.parametrize(
    ("config", "can_look"),
    [
        (SourceConfig(), True),
        (SourceConfig(options={"image_key": None}), True),
        (SourceConfig(options={"image_key": "photo"}), False),
        (SourceConfig(format="messages"), False),
    ],
)
def test_other_forms_and_other_names_of_keys_are_read_whole(config: SourceConfig, can_look: bool):
    assert can_look_for_media(config) is can_look
