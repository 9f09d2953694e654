"""JSON and JSONL files as indexed records: what is read, what is one record's trouble, and what is the file's."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from vlm.data.records.index import RECORDS_PER_BATCH, IndexedRecords, parse_record
from vlm.data.records.open import stream_records
from vlm.data.sample import BadSample

RECORDS = [
    {"id": 1, "text": "línea"},
    {"id": 2, "more": [{"a": None}, 1.5]},
    {"id": 3, "text": "a\u2028b\x85c\u2029]d"},
]


def dumped(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


LINES = [dumped(record) for record in RECORDS]
MARK = b"\xef\xbb\xbf"
CONTENTS = {
    "list.json": b"[" + b",".join(LINES) + b"]",
    "spaced.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode() + b"\r\n",
    "escaped.json": json.dumps(RECORDS).encode(),
    "mark.json": MARK + b"[" + b", ".join(LINES) + b"]",
    "lines.jsonl": b"\n".join(LINES) + b"\n",
    "open.jsonl": b"\n".join(LINES),
    "crlf.jsonl": b"\r\n".join(LINES) + b"\r\n",
    "mark.jsonl": MARK + b"\n".join(LINES),
    "gaps.jsonl": b"\n \n" + b"\n\r\n\n".join(LINES) + b"\n\n",
    "indented.jsonl": b"\n".join(b" \t" + line + b" " for line in LINES),
}


def indexed(folder: Path, name: str, content: bytes) -> IndexedRecords:
    (folder / name).write_bytes(content)
    return IndexedRecords(folder / name, folder / "cache")


def everything(records: IndexedRecords) -> list[Any]:
    return [records[index] for index in range(len(records))]


def told(records: IndexedRecords, index: int) -> str:
    """What is wrong with a record."""
    with pytest.raises(BadSample) as caught:
        records[index]
    return caught.value.reason


@pytest.mark.parametrize("name", CONTENTS)
def test_records_are_read_indexed_and_streamed(tmp_path: Path, name: str):
    """Only a line feed ends a line: other characters that Unicode calls line breaks stand within strings."""
    assert everything(indexed(tmp_path, name, CONTENTS[name])) == RECORDS
    assert list(stream_records(str(tmp_path / name), tmp_path / "cache")) == RECORDS


BROKEN = {
    "torn": (b'{"id": ', "not JSON: "),
    "text": (b"hello", "not JSON: "),
    "two": (b'{"a": 1} {"b": 2}', "not JSON: Extra data"),
    "encoding": (b'{"id": "\xff"}', "not UTF-8: "),
    "brackets": (b"[" * 200_000, "not JSON: maximum recursion depth"),
    "digits": (b'{"id": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_one_records_trouble(tmp_path: Path, name: str):
    line, said = BROKEN[name]
    records = indexed(tmp_path, "a.jsonl", b"\n".join([LINES[0], line, LINES[1]]))
    assert len(records) == 3
    assert (records[0], records[2]) == (RECORDS[0], RECORDS[1])
    assert told(records, 1).startswith(said)
    first, second, third = stream_records(str(tmp_path / "a.jsonl"), tmp_path / "cache")
    assert (first, third) == (RECORDS[0], RECORDS[1])
    assert isinstance(second, BadSample)
    assert second.reason.startswith(said)


def test_an_item_of_a_list_in_another_encoding_is_one_records_trouble(tmp_path: Path):
    records = indexed(tmp_path, "a.json", b'[{"a": 1}, {"a": "\xff"}, {"a": "\xe2\x80\xa8"}]')
    assert told(records, 1).startswith("not UTF-8: ")
    assert (records[0], records[2]) == ({"a": 1}, {"a": "\u2028"})


@pytest.mark.parametrize("content", [b"[%b, %b]", b" [\n%b ,%b\n] \n"])
def test_a_list_may_hold_what_only_python_takes_for_json(tmp_path: Path, content: bytes):
    """As Python writes it: without a number, and beside it brackets in a text and another encoding."""
    records = indexed(tmp_path, "a.json", content % (b'{"a": NaN, "b": "],["}', b'{"a": "\xff"}'))
    assert len(records) == 2
    assert records[0]["a"] != records[0]["a"]
    assert records[0]["b"] == "],["
    assert told(records, 1).startswith("not UTF-8: ")


def test_items_that_are_no_mappings_are_read_as_they_are(tmp_path: Path):
    """That they are no records is for the reader to say, of each."""
    values = [1, None, [], "text, [with] {brackets}", {"a": {"b": [1, 2]}}, True]
    assert everything(indexed(tmp_path, "a.json", json.dumps(values).encode())) == values
    assert everything(indexed(tmp_path, "a.jsonl", b"\n".join(map(dumped, values)))) == values


FILES = {
    "empty.json": (b"", "empty.json: the file is empty"),
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
    "dict.json": (
        b'{"id": 1}',
        "dict.json: a list of records is needed, or one record on each line, got an object with the keys id",
    ),
    "text.json": (b'"abc"', "text.json: a list of records is needed, or one record on each line, got .*str"),
    "torn.json": (b'[{"id": 1}, {"id"', r"torn.json: not JSON \(.*\); a list of records is needed"),
    "more.json": (b'[{"id": 1}] [', r"more.json: not JSON \("),
    "comma.json": (b'[{"id": 1},]', r"comma.json: not JSON \("),
    "open.json": (b'[{"id": NaN}', r"open.json: not JSON \("),
    "beginning.json": (b"x1, NaN]", r"beginning.json: not JSON \("),
    "text.html.json": (b"<html>", "text.html.json: it is text that begins with '<html>'"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_list_of_records_says_what_is_needed(tmp_path: Path, name: str):
    content, said = FILES[name]
    with pytest.raises(ValueError, match=said):
        indexed(tmp_path, name, content)
    with pytest.raises(ValueError, match=said):
        list(stream_records(str(tmp_path / name), tmp_path / "cache"))


@pytest.mark.parametrize(("name", "content"), [("a.json", b"[]"), ("a.json", b" [\n] "), ("a.jsonl", b"\n\n")])
def test_a_file_may_hold_no_record(tmp_path: Path, name: str, content: bytes):
    assert len(indexed(tmp_path, name, content)) == 0


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_more_records_than_are_written_at_a_time(tmp_path: Path, name: str):
    lines = [b'{"n": %d}' % number for number in range(2 * RECORDS_PER_BATCH + 7)]
    content = b"\n".join(lines) if name.endswith("l") else b"[" + b",".join(lines) + b"]"
    records = indexed(tmp_path, name, content)
    assert len(records) == len(lines)
    assert [records[index]["n"] for index in (0, RECORDS_PER_BATCH - 1, RECORDS_PER_BATCH, -1)] == [
        0,
        RECORDS_PER_BATCH - 1,
        RECORDS_PER_BATCH,
        len(lines) - 1,
    ]


def test_pickled_records_are_the_same_and_small(tmp_path: Path):
    records = indexed(tmp_path, "a.jsonl", b"\n".join(LINES * 500))
    pickled = pickle.dumps(records)
    again = pickle.loads(pickled)
    assert everything(again) == RECORDS * 500
    assert again.fingerprint == records.fingerprint
    assert len(pickled) < 1000


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path):
    first = indexed(tmp_path, "a.jsonl", LINES[0]).fingerprint
    assert indexed(tmp_path, "b.jsonl", LINES[0]).fingerprint == first
    assert indexed(tmp_path, "a.jsonl", LINES[1]).fingerprint != first


def test_a_file_that_is_read_as_lines_and_as_a_list_has_two_indices(tmp_path: Path):
    """The same bytes, one record or several."""
    content = dumped({"data": RECORDS})
    assert everything(indexed(tmp_path, "a.json", content)) == RECORDS
    assert everything(indexed(tmp_path, "a.jsonl", content)) == [{"data": RECORDS}]


def test_records_that_are_open_survive_a_change_of_the_file(tmp_path: Path):
    records = indexed(tmp_path, "a.jsonl", LINES[0])
    changed = indexed(tmp_path, "a.jsonl", LINES[1])
    assert (records[0], changed[0]) == (RECORDS[0], RECORDS[1])


def test_parsing_names_the_record():
    with pytest.raises(BadSample, match="record 'b': not JSON"):
        parse_record(b"{", "b")
    assert parse_record(MARK + b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    "line",
    [
        b'{"a": NaN, "b": Infinity}', b'{"a": 1, "a": 2}', b"1e999", b"-0", b"-0.0", b"5e-324", b" [1 ,\r\n2] ",
        b"123456789012345678901234567890", b"18446744073709551616", b'"\\ud800"', b'"\\ud83d\\ude00 \\/"', MARK + b"[]",
        '"\u732b"'.encode("utf-16"), '"\U0001f431\x7f\u2028"'.encode(),
    ],
)  # fmt: skip
def test_values_are_those_of_pythons_parser(line: bytes):
    assert repr(parse_record(line)) == repr(json.loads(line))


@pytest.mark.parametrize(
    "line",
    [b"[1,]", b"01", b'"\x01"', b'"\xff"', b"{'a': 1}", b"1" * 5000, b"[" * 9999, b"{} {}", b"\x0c1", b""],
)
def test_what_pythons_parser_refuses_is_refused(line: bytes):
    with pytest.raises(BadSample, match=r"not (JSON|UTF-8)"):
        parse_record(line)
