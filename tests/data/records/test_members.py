"""Records of queries and what they should find: every form is read, equal contents have equal keys."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.records.formats import read_caption, read_pair
from vlm.data.records.members import choose_member, member_key, split_members
from vlm.data.sample import BadSample, ImageRef, Sample, Turn


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


FORMS: dict[str, dict[str, Any]] = {
    "own": {"query": "q", "positive": {"text": "p"}, "negatives": ["n", "m"]},
    "sentence-transformers": {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
    "ms-swift": {"messages": user("q"), "positive_messages": [user("p")], "negative_messages": [user("n"), user("m")]},
    "ms-swift, earlier": {"query": "q", "response": "p", "rejected_response": ["n", "m"]},
    "VLM2Vec": {
        "qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": "", "neg_text": ["n", "m"],
        "neg_image_path": ["", ""],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, images: Path):
    members = split_members(read_pair(FORMS[form], images))
    assert [[part for turn in member.turns for part in turn.content] for member in members] == [
        ["q"],
        ["p"],
        ["n"],
        ["m"],
    ]
    assert {turn.role for member in members for turn in member.turns} == {"user"}


def test_keys_may_have_other_names(images: Path):
    record = {"title": "q", "body": "p", "wrong": ["n"]}
    sample = read_pair(record, images, query_key="title", positive_key="body", negative_key="wrong")
    assert len(split_members(sample)) == 3


def test_images_stand_at_their_marks_or_first(images: Path):
    record = {
        "qry": "<|image_1|> What is here?\n", "qry_image_path": "a.png", "pos_text": "", "pos_image_path": "b.png",
    }  # fmt: skip
    query, positive = split_members(read_pair(record, images))
    assert query.turns[0].content == (ImageRef(images / "a.png"), "\nWhat is here?")
    assert positive.turns[0].content == (ImageRef(images / "b.png"),)
    both = {"query": {"text": "a dog", "images": ["a.png", "b.png"], "instruction": "Find it."}, "positive": "p"}
    query, _ = split_members(read_pair(both, images))
    assert [turn.role for turn in query.turns] == ["system", "user"]
    assert query.turns[1].content == (ImageRef(images / "a.png"), ImageRef(images / "b.png"), "\na dog")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"query": "q"}, "`positive`: a text, messages"),
        ({"positive": "p"}, "`query`: a text, messages"),
        ({"query": {"caption": "q"}, "positive": "p"}, "`query`: a text, messages"),
        ({"query": {"text": "q", "colour": "red"}, "positive": "p"}, "`query.colour` is not read"),
        ({"query": {"text": ""}, "positive": "p"}, "`query` has neither a text nor an image"),
        ({"query": {"text": "q", "image": "none.png"}, "positive": "p"}, "none.png does not exist"),
        ({"messages": user("q"), "positive_messages": [user("p"), user("r")]}, "a record for each positive"),
        ({"query": [*user("q"), {"role": "assistant", "content": "r"}], "positive": "p"}, "end with a reply"),
        ({"qry": "q", "pos_text": "", "pos_image_path": ""}, "it has no positive"),
    ],
)
def test_what_cannot_be_read_is_refused(record: dict[str, Any], problem: str, images: Path):
    with pytest.raises(BadSample, match=problem):
        read_pair(record, images)


def test_any_answered_record_is_a_pair(images: Path):
    sample = read_caption({"image": "a.png", "caption": "a cat"}, images)
    query, positive = split_members(sample)
    assert query.turns[0].content == (ImageRef(images / "a.png"),)
    assert positive.turns == (Turn("user", ("a cat",)),)
    assert choose_member(sample, is_query=False).turns == positive.turns
    alone = Sample("1", (Turn("user", ("a text",)),))
    assert choose_member(alone, is_query=True) is choose_member(alone, is_query=False) is alone
    with pytest.raises(BadSample, match="it has no query and positive"):
        split_members(alone)


def test_keys_are_of_contents(images: Path):
    records = [
        {"query": {"text": "x", "image": "a.png"}, "positive": "x"},
        {"query": {"text": "x", "image": "a.png", "instruction": "Find."}, "positive": {"text": "x"}},
        {"query": {"text": "x", "image": "b.png"}, "positive": "y"},
    ]
    keys = [list(map(member_key, split_members(read_pair(record, images)))) for record in records]
    assert keys[0] == keys[1]
    assert len({keys[0][0], *keys[2], keys[0][1]}) == 4


@pytest.mark.parametrize("key", ["image", "images", "videos", "system"])
def test_what_belongs_to_no_member_is_refused(key: str, images: Path):
    value = "a.png" if key == "image" else "be brief" if key == "system" else ["a.png"]
    for form in ("own", "VLM2Vec"):
        with pytest.raises(BadSample, match=f"`{key}` is next to query and positive but belongs to neither"):
            read_pair({**FORMS[form], key: value}, images)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(BadSample, match="`messages`: calls of tools are not compared"):
        read_pair({**FORMS["ms-swift"], "messages": [*user("q"), call, *user("so?")]}, images)
    record = {**FORMS["ms-swift"], "messages": user("<image>q"), "images": ["a.png"]}
    assert split_members(read_pair(record, images))[0].images == [ImageRef(images / "a.png")]
