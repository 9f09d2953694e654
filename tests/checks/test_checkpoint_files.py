"""Files of checkpoints before they are opened: what is no regular file, no object, not whole, or named wrongly."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlm.checks.checkpoint_files import (
    INDEX,
    MAX_DEPTH,
    MAX_JSON_BYTES,
    SAFETENSORS,
    inspect_folder,
    nested_objects,
    read_header,
    read_headers,
    read_object,
    shown,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that could be a checkpoint's: two shards and their index."""
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    weight_map = {}
    for number in (1, 2):
        save_file({f"layer.{number}.weight": torch.ones(2, 3)}, tmp_path / f"{number}.safetensors")
        weight_map[f"layer.{number}.weight"] = f"{number}.safetensors"
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_whole_folder_passes_and_its_headers_are_read(folder: Path):
    inspect_folder(folder)
    headers = read_headers(folder)
    assert headers is not None
    assert {name: header.shape for name, header in headers.items()} == {
        "layer.1.weight": (2, 3), "layer.2.weight": (2, 3),
    }  # fmt: skip
    assert headers["layer.1.weight"].dtype == "F32"
    assert headers["layer.1.weight"].size == 6
    assert headers["layer.1.weight"].is_floating


def test_a_folder_that_has_changed_is_looked_at_again(folder: Path):
    inspect_folder(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json holds a list; a JSON object is needed"):
        inspect_folder(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[1]", "holds a list; a JSON object is needed"), (b"null", "holds null"),
        (b"", "is not JSON: Expecting value"),
        (b'{"a": "\xff"}', r"is not JSON: it is not in UTF-8 \(byte 7\)"),
        (b'{"a": NaN}', "is not JSON: a value is NaN"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), f"is nested too deeply: at most {MAX_DEPTH}"),
    ],
)  # fmt: skip
def test_json_that_is_no_object_is_refused_by_name(tmp_path: Path, text: bytes, said: str):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json {said}"):
        read_object(tmp_path / "config.json")


def test_infinity_is_a_value_and_records_of_runs_may_hold_nan(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"limits": [0.0, Infinity]}')
    assert read_object(tmp_path / "config.json") == {"limits": [0.0, float("inf")]}
    (tmp_path / "scores.json").write_text('{"loss": NaN}')
    assert list(read_object(tmp_path / "scores.json")) == ["loss"]


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path: Path):
    file = tmp_path / "config.json"
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"config.json is a pipe; a regular file is needed"):
        inspect_folder(tmp_path)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"config.json is a device"):
        inspect_folder(tmp_path)
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(ValueError, match=r"config.json cannot be opened: Too many levels of symbolic links"):
        inspect_folder(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"config.json is a folder"):
        inspect_folder(tmp_path)


def test_a_file_without_end_is_refused_by_its_size(tmp_path: Path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES["config.json"] + 1)
    with pytest.raises(ValueError, match=r"config.json has 16,777,217 bytes; at most 16,777,216 are allowed"):
        inspect_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["../2.safetensors", "/etc/passwd", "", ".", "config.json", 3, None, "a\\b.safetensors"]
)
def test_an_index_names_files_beside_it(folder: Path, name: object):
    write_index(folder, {"layer.1.weight": name})
    with pytest.raises(
        ValueError, match=rf"^{folder}/{INDEX} names .* for layer.1.weight; a .safetensors file next to"
    ):
        inspect_folder(folder)


def test_an_index_that_does_not_fit_its_files_is_refused(folder: Path):
    write_index(folder, {"layer.1.weight": "2.safetensors"})
    with pytest.raises(ValueError, match=r"says that layer.1.weight is in 2.safetensors, which does not contain it"):
        inspect_folder(folder)
    write_index(folder, {"layer.1.weight": "3.safetensors"})
    with pytest.raises(ValueError, match=r"names 3.safetensors, which is missing: the download is not complete"):
        inspect_folder(folder)
    write_index(folder, {})
    with pytest.raises(ValueError, match=r"has no weight_map that says which file holds which tensor"):
        inspect_folder(folder)
    (folder / "2.safetensors").write_bytes((folder / "1.safetensors").read_bytes())
    write_index(folder, {"layer.1.weight": "1.safetensors", "layer.2.weight": "2.safetensors"})
    with pytest.raises(ValueError, match=r"layer.2.weight is in 2.safetensors, which does not contain it"):
        inspect_folder(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04cos", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{}x"]
)
def test_a_file_that_is_not_whole_is_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / SAFETENSORS).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{SAFETENSORS} is (empty|not a complete safetensors file)"):
        read_header(tmp_path / SAFETENSORS)


def test_an_adapter_has_settings_and_weights(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has adapter_config.json, but adapter_model.safetensors is missing"):
        inspect_folder(tmp_path)


def test_names_out_of_files_are_shown_short_and_without_control_characters():
    assert shown("a.b") == "a.b"
    assert shown("\x1b[31m") == r"'\x1b[31m'"
    assert len(shown("x" * 10_000)) < 100


def test_nested_objects_are_found_with_their_keys():
    content = {"a": {"b": {"c": 1}}, "recipe": {"d": {}}}
    assert [path for path, _ in nested_objects(content, ("recipe",))] == ["", "a", "a.b"]
