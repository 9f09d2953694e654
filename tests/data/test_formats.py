"""Readers: LLaVA's records as samples, and errors that name the record."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import picture
from vlm.config import check
from vlm.data.formats import FORMATS, read_llava, read_records, reader_of
from vlm.data.sample import ROLES, BadSample, OverLong, Picture, Sample, Turn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with `a.png`, `b.png` and `deep/c.png`; `outside.png` stands beside it."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.png", "../outside.png"):
        picture().save(images / name)
    return images


def talk(*texts: str) -> list[dict[str, str]]:
    """Turns of a human and gpt in alternation."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def read(folder: Path, *texts: str, **record: Any) -> Sample:
    return read_llava({"id": "7", "conversations": talk(*texts), **record}, folder)


def content(folder: Path, text: str, *images: str) -> tuple[str | Picture, ...]:
    """The content of a first human turn."""
    return read(folder, text, "yes", image=list(images)).turns[0].content


# What is read


def test_a_record_is_a_sample(folder: Path):
    sample = read(folder, "<image>\nwhat?", "a cat", "sure?", "yes", image="a.png")
    seen = Picture(folder / "a.png")
    assert sample == Sample("7", (
        Turn("user", (seen, "\nwhat?")), Turn("assistant", ("a cat",)), Turn("user", ("sure?",)),
        Turn("assistant", ("yes",)),
    ))  # fmt: skip
    assert sample.pictures == [seen]
    assert all(turn.role in ROLES for turn in sample.turns)


@pytest.mark.parametrize(
    "text", ["what is it?\n<image>", "<image>\nwhat is it?", "what <image>is it?", " <image> what is it?"]
)
def test_a_lone_image_is_moved_to_the_start_of_its_turn(folder: Path, text: str):
    assert content(folder, text, "a.png") == (Picture(folder / "a.png"), "\nwhat is it?")


def test_an_image_without_words_stands_alone(folder: Path):
    assert content(folder, "<image>", "a.png") == (Picture(folder / "a.png"),)


def test_several_images_stay_where_they_are(folder: Path):
    found = content(folder, "one <image> two <image><image>", "a.png", "deep/c.png", "b.png")
    names = ("a.png", "deep/c.png", "b.png")
    a, c, b = (Picture(folder / name) for name in names)
    assert found == ("one ", a, " two ", c, b)


def test_images_are_taken_in_order_over_the_turns(folder: Path):
    sample = read(folder, "<image>\none", "1", "<image> and <image>", "2", image=["b.png", "a.png", "b.png"])
    assert [seen.path.name for seen in sample.pictures] == ["b.png", "a.png", "b.png"]
    assert [sum(isinstance(part, Picture) for part in turn.content) for turn in sample.turns] == [1, 0, 2, 0]


@pytest.mark.parametrize("key", ["image", "images"])
def test_images_under_either_key(folder: Path, key: str):
    assert len(read(folder, "<image>\n<image>", "two", **{key: ["a.png", "b.png"]}).pictures) == 2


@pytest.mark.parametrize("record", [{}, {"image": None}, {"image": []}])
def test_text_only(folder: Path, record: dict[str, Any]):
    sample = read(folder, "what?", "that", **record)
    assert sample.pictures == []
    assert sample.turns[0].content == ("what?",)


def test_a_placeholder_in_a_reply_is_text(folder: Path):
    sample = read(folder, "what?", "the tag <image> stands for a picture")
    assert sample.turns[1].content == ("the tag <image> stands for a picture",)


def test_every_role_name_of_llava(folder: Path):
    turns = [{"from": name, "value": name} for name in ("system", "human", "gpt", "user", "assistant")]
    sample = read_llava({"conversations": turns}, folder)
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert sample.id == "?"


def test_numbers_as_ids(folder: Path):
    assert read(folder, "what?", "that", id=12).id == "12"


def test_a_turn_as_templates_read_it(folder: Path):
    turn = Turn("user", (Picture(folder / "a.png"), "\nwhat?", Picture(folder / "b.png")))
    assert turn.as_message("<img>") == {"role": "user", "content": "<img>\nwhat?<img>"}


# What is refused


def made(*texts: str, **record: Any) -> dict[str, Any]:
    """A record with the id 7."""
    return {"id": "7", "conversations": talk(*texts), **record}


BAD = {
    "no mapping": (["x"], "a mapping is needed, got list"),
    "no turns": ({"id": "7"}, "`conversations` must be a list of at least one turn"),
    "empty turns": (made(), "`conversations` must be a list of at least one turn"),
    "no texts": (made(conversations=[*talk("a"), {"from": "gpt", "value": 3}]), "turn 2: `from` and `value`"),
    "no role": (made(conversations=[{"value": "x"}]), "turn 1: `from` and `value` must be strings"),
    "role": (
        made(conversations=[{"from": "robot", "value": "x"}]),
        "turn 1: from='robot'; allowed are human, user, gpt, assistant, system",
    ),
    "no reply": (made("a"), "no reply to learn from"),
    "no path": (made("<image>", "b", image=3), "`image` must be a path or a list"),
    "no paths": (made("<image>", "b", image=["a.png", 3]), "`image` must be a path or a list"),
    "too many images": (made("<image>", "b", image=["a.png", "b.png"]), "1 more image(s) than <image>"),
    "unused image": (made("a", "<image>", image="a.png"), "1 more image(s) than <image>"),
    "too few images": (made("<image><image>", "b", image="a.png"), "more <image> in its text than images"),
    "no image": (made("<image>\nwhat?", "b"), "more <image> in its text than images"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_record_that_cannot_be_used_is_named_with_the_reason(folder: Path, name: str):
    record, said = BAD[name]
    with pytest.raises(BadSample) as caught:
        read_llava(record, folder)
    assert said in caught.value.reason
    assert str(caught.value).startswith(f"record '{'7' if isinstance(record, dict) else '?'}': ")


PATHS = {
    "missing": ("z.png", "z.png does not exist"),
    "a folder": ("deep", "deep does not exist"),
    "upwards": ("../outside.png", "../outside.png leaves the image folder"),
    "upwards and missing": ("../../z.png", "z.png"),
    "through a folder": ("deep/../../outside.png", "leaves the image folder"),
    "absolute": ("{parent}/outside.png", "leaves the image folder"),
    "address": ("https://example.com/a.png", "addresses are not fetched in training; download the picture first"),
    "other address": ("file:///etc/passwd", "addresses are not fetched"),
    "no path at all": ("iVBORw0KGgo" * 30, "does not exist"),
    "null": ("a\0.png", "does not exist"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_no_picture_of_the_folder_is_refused_by_name(folder: Path, name: str):
    path, said = PATHS[name]
    path = path.format(parent=folder.parent)
    with pytest.raises(BadSample) as caught:
        read(folder, "<image>", "b", image=path)
    assert said in caught.value.reason
    assert caught.value.sample_id == "7"
    assert caught.value.file == path


def test_a_folder_linked_into_the_image_folder_is_part_of_it(folder: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture().save(elsewhere / "0.png")
    (folder / "linked").symlink_to(elsewhere)
    sample = read(folder, "<image>", "b", image="linked/0.png")
    assert sample.pictures == [Picture(folder / "linked" / "0.png")]


def test_errors_are_value_errors():
    assert issubclass(OverLong, BadSample)
    assert issubclass(BadSample, ValueError)


def test_the_table_of_formats():
    """What is checked before a run is what there is."""
    assert FORMATS["llava"] is read_llava
    assert tuple(FORMATS) == check.FORMATS


# Files


def test_json_and_jsonl(tmp_path: Path):
    records = [{"id": 1, "text": "línea"}, {"id": 2}]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.jsonl").write_text(f"\n{lines}\n\n", encoding="utf-8")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "a.jsonl") == records


def test_only_a_line_feed_ends_a_line(tmp_path: Path):
    """Other characters that Unicode calls line breaks stand within strings."""
    records = [{"text": "a\u2028b\x85c\u2029d"}, {"text": "e"}]
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    assert read_records(tmp_path / "a.jsonl") == records


FILES = {
    "a.json": ('{"id": 1}', r"a.json: a list of records is needed, got dict"),
    "b.json": ('[{"id": 1}', r"b.json: not JSON \(.*\); one record a line is read from a file named .jsonl"),
    "c.json": ('{"id": 1}\n{"id": 2}', r"c.json: not JSON .*\.jsonl"),
    "d.jsonl": ('{"id": 1}\n\n{"id": 2', r"d.jsonl, line 3: not JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_list_of_records_says_where_it_breaks(tmp_path: Path, name: str):
    text, said = FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_records(tmp_path / name)


# Which reader


def test_a_reader_of_the_users_own_is_named_by_its_function():
    assert reader_of("llava") is read_llava
    assert reader_of("vlm.data.formats:read_llava") is read_llava


@pytest.mark.parametrize("name", ["no.such.module:read", "vlm.data.formats:read_nothing"])
def test_a_reader_that_does_not_exist_is_refused_by_key(name: str):
    with pytest.raises(ValueError, match=f"dataset.format={name}: "):
        reader_of(name)
