"""A folder of everything that goes wrong with data: each record is named with its reason, and the rest trains."""

import json
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.data.vision.test_jpeg import KINDS
from tests.tiny_parts import Parts, picture
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder


def bomb() -> bytes:
    """The beginning of a PNG that says it has a billion pixels."""
    header = struct.pack(">IIBBBBB", 32000, 32000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    first = struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + first + struct.pack(">I", 9) + b"IDAT"


def torn() -> bytes:
    buffer = BytesIO()
    picture(size=(80, 80)).save(buffer, "JPEG")
    return buffer.getvalue()[:-200]


def talk(image: Any, *texts: str) -> dict[str, Any]:
    texts = texts or ("<image>\nwhat?", "a cat")
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"image": image, "conversations": turns}


FILES = {
    "torn.jpg": torn(),
    "empty.jpg": b"",
    "page.jpg": b"<!DOCTYPE html><title>404</title>",
    "bomb.png": bomb(),
}
BROKEN: dict[str, tuple[Any, str]] = {
    "torn": (talk("torn.jpg"), "image .*torn.jpg does not open: .*truncated"),
    "empty": (talk("empty.jpg"), "image .*empty.jpg does not open: the file is empty"),
    "page": (talk("page.jpg"), "image .*page.jpg does not open: it is text that begins with '<!DOCTYPE"),
    "bomb": (talk("bomb.png"), "image .*bomb.png does not open: .*decompression bomb"),
    "missing": (talk("none.jpg"), "image file .*none.jpg does not exist"),
    "outside": (talk("../outside.png"), "../outside.png leaves the image folder"),
    "address": (talk("https://example.com/a.jpg"), "addresses are not fetched in training"),
    "more placeholders": (
        talk("good.png", "<image><image>", "b"),
        "its text has 2 <image>, but the record has 1 image",
    ),
    "fewer placeholders": (talk(["good.png"] * 2), "its text has 1 <image>, but the record has 2 images"),
    "no turns": (talk("good.png") | {"conversations": []}, "`conversations` must be a list of at least one turn"),
    "no reply": (talk(None, "what?"), "no reply to train on"),
    "wrong type": (talk(None, "what?", [3]), "turn 2: `from` and `value` must be strings"),
    "wrong path": (talk(7), "`image` must be a path"),
    "half a pair": (talk(None, "what?", "a cat \ud83d"), r"turn 2 \(assistant\) has half of a surrogate pair"),
    "no mapping": (["x"], "each record must be a JSON object, got list"),
}
RAW = {"not UTF-8": (b'{"id": "\xff\xfe"}', "not UTF-8"), "torn line": (b'{"id": "a", "conv', "not JSON")}


@pytest.fixture
def load(tmp_path: Path, parts: Parts):
    """`load(**policies)`: every broken record, with a good one after each, and images of every kind."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture().save(tmp_path / "outside.png")
    picture().save(folder / "good.png")
    for name, content in [*FILES.items(), *KINDS.items()]:
        (folder / name).write_bytes(content)
    lines = []
    for name, (record, _) in BROKEN.items():
        named = {"id": name, **record} if isinstance(record, dict) else record
        lines += [json.dumps(named).encode(), json.dumps({"id": "good", **talk("good.png")}).encode()]
    lines += [raw for raw, _ in RAW.values()]
    lines += [json.dumps({"id": "good", **talk(name)}).encode() for name in KINDS]
    (tmp_path / "records.jsonl").write_bytes(b"\n".join(lines))

    def make(**policies: Any) -> SampleDataset:
        config = DatasetConfig(path=str(tmp_path / "records.jsonl"), image_folder=str(folder), **policies)
        return load_dataset(config, SampleEncoder(parts.processor(), 200, truncate=False))

    return make


def test_each_is_listed_with_its_reason_and_the_rest_is_there(load):
    data = load(on_bad_sample="skip", max_skipped=1.0)
    expected = [said for _, said in BROKEN.values()] + [said for _, said in RAW.values()]
    assert len(data.skipped) == len(expected)
    for skipped, said in zip(data.skipped, expected, strict=True):
        assert re.search(said, skipped.reason)
    named = [name for name, (record, _) in BROKEN.items() if isinstance(record, dict)]
    assert [one.id for one in data.skipped if one.id != "?"] == named
    assert len(data) == len(BROKEN) + len(KINDS)
    assert all(isinstance(data[index], dict) for index in range(len(data)))
    assert {data.sample(index).id for index in range(len(data))} == {"good"}


def test_the_first_stops_a_run_that_skips_nothing(load):
    with pytest.raises(ValueError, match=r"records.jsonl, record 0: record 'torn': image .*torn.jpg does not open"):
        load()


def test_so_many_stop_a_run_that_skips_some(load):
    with pytest.raises(ValueError, match=r"17 of 40 records cannot be used, more than dataset.max_skipped=0.1 allows"):
        load(on_bad_sample="skip")


def test_nothing_stands_in_for_what_is_found_only_on_the_way(load):
    """Headers say nothing of the torn one."""
    data = load(on_bad_sample="skip", max_skipped=1.0, check_samples=0)
    found = [one for one in (data[index] for index in range(len(data))) if not isinstance(one, dict)]
    assert [(one.id, one.record) for one in found] == [("torn", 0)]
