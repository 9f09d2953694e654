"""Files of strangers, of torn disks and of runs that are being written never stop who reads them."""

import json
import os
from pathlib import Path

import pytest

from vlm.runs import files
from vlm.runs.files import Folder, flatten, number_at


@pytest.mark.parametrize("content", ["", "[1]", "{", "nonsense", "\x00\xff", '{"a": ' * 4000 + "1" + "}" * 4000, "NaN"])
def test_what_is_no_json_object_is_empty_and_named(tmp_path: Path, content: str):
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    folder = Folder(tmp_path)
    assert folder.json("a.json") == {}
    assert "not a JSON object" in folder.damaged["a.json"]


@pytest.mark.parametrize("content", ["- 1", "a: [", "!!python/object/apply:os.system ['true']", "a: &a [1]\nb: *a"])
def test_what_is_no_plain_yaml_mapping_is_empty_and_named(tmp_path: Path, content: str):
    (tmp_path / "a.yaml").write_text(content)
    folder = Folder(tmp_path)
    assert folder.yaml("a.yaml") == {}
    assert "not a YAML mapping" in folder.damaged["a.yaml"]


def test_missing_files_are_empty_and_no_damage(tmp_path: Path):
    folder = Folder(tmp_path / "nowhere")
    assert (folder.json("a"), folder.yaml("a"), folder.json_lines("a"), folder.text("a"), folder.tail("a")) == (
        {}, {}, [], "", ""
    )  # fmt: skip
    assert folder.damaged == {}


def test_a_line_that_is_being_written_is_no_damage_and_torn_ones_are_counted(tmp_path: Path):
    (tmp_path / "a").write_text('{"step": 1}\n{"st\n\n[3]\n{"step": 2}\n{"step": 3, "lo')
    folder = Folder(tmp_path)
    assert folder.json_lines("a") == [{"step": 1}, {"step": 2}]
    assert folder.damaged["a"].startswith("2 of 5 lines")


def test_only_regular_files_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        assert Folder(tmp_path).text(name) == ""
    os.symlink("/dev/zero", tmp_path / "zero")
    assert Folder(tmp_path).json("zero") == {}


def test_reading_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    monkeypatch.setattr(files, "MAX_YAML_BYTES", 100)
    (tmp_path / "a").write_text(json.dumps({"a": "b" * 200}))
    folder = Folder(tmp_path)
    assert folder.json("a") == {}
    assert "at most 100 are read" in folder.damaged["a"]
    assert folder.yaml("a") == {}
    assert folder.text("a", 3) == '{"a'
    (tmp_path / "log").write_text("first\nsecond\nthird\n")
    assert folder.tail("log", 9) == "third\n"


def test_links_that_lead_out_are_left_out(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "secret.png").write_text("secret")
    os.symlink(tmp_path / "secret.png", tmp_path / "run" / "a.png")
    (tmp_path / "run" / "b.png").write_text("own")
    assert [file.name for file in Folder(tmp_path / "run").files("*.png")] == ["b.png"]


def test_values_of_unknown_shape():
    value = {"a": {"b": True, "c": 1e400, "d": 2}}
    assert (number_at(value, "a", "b"), number_at(value, "a", "c"), number_at(value, "a", "d")) == (None, None, 2)
    assert number_at(value, "a", "d", "e") is None
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "d": [1, {"e": 2}]}
