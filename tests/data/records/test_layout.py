"""How JSON files hold their records: the content decides, and what holds none says what reads it."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from vlm.data.records.open import open_records, stream_records

RECORDS = [{"id": 1, "text": "línea"}, {"id": 2, "items": [{"a": 1}]}, {"id": 3}]
LINES = "\n".join(json.dumps(record) for record in RECORDS) + "\n"
LIST = json.dumps(RECORDS)
DOCVQA = json.dumps({"dataset_name": "docvqa", "version": "1.0", "data": RECORDS})
PRETTY = json.dumps({"annotations": RECORDS, "info": {"year": 2014}}, indent=2)


def read(folder: Path, name: str, content: str | bytes) -> list[Any]:
    """All records, by index, which streaming has to give too."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    records = open_records(str(path), folder / "cache")
    found = [records[index] for index in range(len(records))]
    assert list(stream_records(str(path), folder / "cache")) == found
    return found


AS_WRITTEN: dict[str, tuple[str, str | bytes]] = {
    "lines": ("a.jsonl", LINES),
    "lines in .json": ("a.json", LINES),
    "lines behind a mark": ("a.json", "\ufeff\n" + LINES),
    "lines in .ndjson": ("a.ndjson", LINES),
    "upper case": ("A.JSON", LIST),
    "a list in .jsonl": ("a.jsonl", LIST),
    "a list over several lines in .jsonl": ("a.jsonl", json.dumps(RECORDS, indent=2)),
    "a mapping around the list": ("a.json", DOCVQA),
    "a mapping over several lines": ("a.json", PRETTY),
    "a mapping over several lines in .jsonl": ("a.jsonl", PRETTY),
    "a record a line within a mapping": ("a.json", '{"data": [\n' + LINES.strip().replace("\n", ",\n") + "\n]}\n"),
    "compressed lines": ("a.jsonl.gz", gzip.compress(LINES.encode())),
    "a compressed list": ("a.json.gz", gzip.compress(LIST.encode())),
    "a compressed mapping": ("a.JSON.gz", gzip.compress(PRETTY.encode())),
}


@pytest.mark.parametrize("kind", AS_WRITTEN)
def test_the_same_records_however_they_are_held(tmp_path: Path, kind: str):
    assert read(tmp_path, *AS_WRITTEN[kind]) == RECORDS


def test_a_single_record_on_its_line_is_no_mapping_around_a_list(tmp_path: Path):
    assert read(tmp_path, "a.jsonl", json.dumps(RECORDS[1])) == [RECORDS[1]]


COCO_IMAGE = [{"id": 1, "file_name": "a.jpg"}]
REFUSED: dict[str, tuple[Any, str]] = {
    "captions of COCO": (
        {"images": COCO_IMAGE, "annotations": [{"image_id": 1, "caption": "a"}]},
        "COCO's captions; convert them first: vlm data convert .*a.json OUT.jsonl --from coco-captions",
    ),
    "boxes of COCO": (
        {"images": COCO_IMAGE, "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}], "categories": [{"id": 1}]},
        "COCO's detections; convert them first: vlm data convert .*a.json OUT.jsonl --from coco-detections",
    ),
    "questions of VQAv2": (
        {"info": {}, "questions": [{"question_id": 1, "image_id": 1, "question": "what?"}]},
        "vlm data convert .*a.json OUT.jsonl --from vqa --annotations",
    ),
    "answers of VQAv2": (
        {"annotations": [{"question_id": 1, "answers": [{"answer": "a"}]}]},
        "VQAv2's answers.*--annotations .*a.json",
    ),
    "a single record": (
        {"id": 1, "conversations": [{"from": "human", "value": "a"}]},
        r"a single record .*jq -s \. ",
    ),
    "several lists": (
        {"train": [{"id": 1}], "val": [{"id": 2}]},
        "with the keys train, val; jq '.train' OLD > NEW.json",
    ),
    "records by id": ({"1": {"a": 1}, "2": {"a": 2}}, "a list of records is needed.*with the keys 1, 2"),
    "columns": ({"image": ["a"], "caption": ["b"]}, "a single record|with the keys image, caption"),
    "values over several lines": ('{\n"a": 1\n}\n{\n"a": 2\n}\n', "jq -c . OLD > NEW.jsonl"),
    "cut off": ('{"data": [{"id": 1},', "not JSON .*a list of records is needed"),
    "a page": ("<!DOCTYPE html>", "a web page"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    "UTF-16": (LIST.encode("utf-16"), "UTF-16.*iconv"),
    "Parquet": (b"PAR1\x15\x04", "it is Parquet: name it .parquet"),
    "compressed without its name": (gzip.compress(b"[]"), "gzip-compressed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_list_of_records_says_what_reads_it(tmp_path: Path, kind: str):
    content, said = REFUSED[kind]
    for readers in (open_records, lambda *where: list(stream_records(*where))):
        (tmp_path / "a.json").write_bytes(
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        with pytest.raises(ValueError, match=said):
            readers(str(tmp_path / "a.json"), tmp_path / "cache")


@pytest.mark.parametrize("content", [gzip.compress(LINES.encode() * 99)[:-9], LINES.encode()])
def test_what_does_not_decompress_is_named(tmp_path: Path, content: bytes):
    with pytest.raises(ValueError, match=r"a.jsonl.gz: does not decompress: "):
        read(tmp_path, "a.jsonl.gz", content)


def test_pointers_and_pages_in_place_of_tables_of_bytes_are_named(tmp_path: Path):
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        open_records(str(tmp_path / "a.parquet"), tmp_path / "cache")
