"""Conversations: in LLaVA's form and as chat messages."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.tiny_parts import picture
from vlm.data.records.conversations import read_llava, read_messages
from vlm.data.sample import ROLES, BadSample, ImageRef, Sample, Turn, VideoRef


def talk(*texts: str) -> list[dict[str, str]]:
    """Turns of a human and gpt in alternation."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def read(folder: Path, *texts: str, **record: Any) -> Sample:
    return read_llava({"id": "7", "conversations": talk(*texts), **record}, folder)


def content(folder: Path, text: str, *images: str) -> tuple[str | ImageRef, ...]:
    """The content of a first human turn."""
    return read(folder, text, "yes", image=list(images)).turns[0].content


# What is read


def test_a_record_is_a_sample(folder: Path):
    sample = read(folder, "<image>\nwhat?", "a cat", "sure?", "yes", image="a.png")
    seen = ImageRef(folder / "a.png")
    assert sample == Sample("7", (
        Turn("user", (seen, "\nwhat?")), Turn("assistant", ("a cat",)), Turn("user", ("sure?",)),
        Turn("assistant", ("yes",)),
    ))  # fmt: skip
    assert sample.images == [seen]
    assert all(turn.role in ROLES for turn in sample.turns)


@pytest.mark.parametrize(
    "text", ["what is it?\n<image>", "<image>\nwhat is it?", "what <image>is it?", " <image> what is it?"]
)
def test_a_lone_image_is_moved_to_the_start_of_its_turn(folder: Path, text: str):
    assert content(folder, text, "a.png") == (ImageRef(folder / "a.png"), "\nwhat is it?")


def test_an_image_without_words_stands_alone(folder: Path):
    assert content(folder, "<image>", "a.png") == (ImageRef(folder / "a.png"),)


def test_several_images_stay_where_they_are(folder: Path):
    found = content(folder, "one <image> two <image><image>", "a.png", "deep/c.png", "b.png")
    names = ("a.png", "deep/c.png", "b.png")
    a, c, b = (ImageRef(folder / name) for name in names)
    assert found == ("one ", a, " two ", c, b)


def test_images_are_taken_in_order_over_the_turns(folder: Path):
    sample = read(folder, "<image>\none", "1", "<image> and <image>", "2", image=["b.png", "a.png", "b.png"])
    assert [seen.path.name for seen in sample.images] == ["b.png", "a.png", "b.png"]
    assert [sum(isinstance(part, ImageRef) for part in turn.content) for turn in sample.turns] == [1, 0, 2, 0]


@pytest.mark.parametrize("key", ["image", "images"])
def test_images_under_either_key(folder: Path, key: str):
    assert len(read(folder, "<image>\n<image>", "two", **{key: ["a.png", "b.png"]}).images) == 2


@pytest.mark.parametrize("record", [{}, {"image": None}, {"image": []}])
def test_text_only(folder: Path, record: dict[str, Any]):
    sample = read(folder, "what?", "that", **record)
    assert sample.images == []
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
    turn = Turn("user", (ImageRef(folder / "a.png"), "\nwhat?", ImageRef(folder / "b.png")))
    assert turn.as_message("<img>") == {"role": "user", "content": "<img>\nwhat?<img>"}


# What is refused


def made(*texts: str, **record: Any) -> dict[str, Any]:
    """A record with the id 7."""
    return {"id": "7", "conversations": talk(*texts), **record}


BAD = {
    "no mapping": (["x"], "each record must be a JSON object, got list"),
    "no turns": ({"id": "7"}, "it has no `conversations`; its keys are id"),
    "empty turns": (made(), "`conversations` must be a list of at least one turn"),
    "no texts": (made(conversations=[*talk("a"), {"from": "gpt", "value": True}]), "turn 2: `from` and `value`"),
    "no role": (made(conversations=[{"value": "x"}]), "turn 1: `from` and `value` must be strings"),
    "role": (
        made(conversations=[{"from": "robot", "value": "x"}]),
        "turn 1: from='robot'; allowed are human, user, gpt, assistant, system",
    ),
    "no path": (made("<image>", "b", image=3), "`image` must be a path or a list"),
    "no paths": (
        made("<image>", "b", image=["a.png", 3]),
        "`image` must be a path, a list of paths, or hold the bytes of",
    ),
    "too many images": (
        made("<image>", "b", image=["a.png", "b.png"]),
        "its text has 1 <image>, but the record has 2 images: ",
    ),
    "unused image": (made("a", "<image>", image="a.png"), "its text has no <image>, but the record has 1 image: "),
    "too few images": (
        made("<image><image>", "b", image="a.png"),
        "its text has 2 <image>, but the record has 1 image: ",
    ),
    "no image": (made("<image>\nwhat?", "b"), "its text has 1 <image>, but the record has no images: name the image"),
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
    "address": ("https://example.com/a.png", "addresses are not fetched in training; download the image first"),
    "other address": ("file:///etc/passwd", "addresses are not fetched"),
    "no path at all": ("QUJD" * 30, "does not exist"),
    "null": ("a\0.png", "does not exist"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_no_image_of_the_folder_is_refused_by_name(folder: Path, name: str):
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
    assert sample.images == [ImageRef(folder / "linked" / "0.png")]


# Videos


def test_images_and_videos_are_handed_out_apart(folder: Path):
    sample = read(folder, "<video>a<image>b<video>", "yes", images=["a.png"], videos=["v.mp4", "w.mp4"])
    v, w = VideoRef(folder / "v.mp4"), VideoRef(folder / "w.mp4")
    assert sample.turns[0].content[0] == ImageRef(folder / "a.png"), "a lone image is moved to the start"
    assert sample.videos == [v, w]
    mixed = read(folder, "<image><video>a<image>b<video>", "yes", images=["a.png", "b.png"], video=["v.mp4", "w.mp4"])
    a, b = ImageRef(folder / "a.png"), ImageRef(folder / "b.png")
    assert mixed.turns[0].content == (a, v, "a", b, "b", w)


def test_frames_take_the_place_of_videos(folder: Path):
    sample = read(folder, "<video>what?", "yes", video="v.mp4")
    frames = (ImageRef(folder / "v.mp4", frame=0), "\n", ImageRef(folder / "v.mp4", frame=5))
    assert sample.with_videos(lambda video: frames).turns[0].content == (*frames, "what?")
    assert read(folder, "what?", "yes").with_videos(lambda video: frames) == read(folder, "what?", "yes")


COUNTS = {
    "too few videos": ("<video><video>", {"video": "v.mp4"}, "its text has 2 <video>, but the record has 1 video: "),
    "too many videos": (
        "<video>",
        {"videos": ["v.mp4", "w.mp4"]},
        "its text has 1 <video>, but the record has 2 videos: ",
    ),
    "an image for a video": ("<video>", {"image": "a.png"}, "its text has no <image>, but the record has 1 image: "),
    "no path": ("<video>", {"video": 3}, "`video` must be a path or a list of paths, got 3"),
    "leaves": ("<video>", {"video": "../outside.png"}, "leaves the image folder"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_videos_are_counted_and_looked_for(folder: Path, name: str):
    text, record, said = COUNTS[name]
    with pytest.raises(BadSample) as caught:
        read(folder, text, "yes", **record)
    assert said in caught.value.reason


# Messages


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said_by(folder: Path, *messages: dict[str, Any], **record: Any) -> Sample:
    return read_messages({"id": "7", "messages": list(messages), **record}, folder)


def test_messages_keep_their_order_and_their_system_turn(folder: Path):
    sample = said_by(
        folder, message("system", "be brief"), message("user", "what <image> is\n<image>?"), message("assistant", "a"),
        message("user", "and <image>"), message("assistant", "b <image>"), images=["b.png", "a.png", "deep/c.png"],
    )  # fmt: skip
    a, b, c = (ImageRef(folder / name) for name in ("a.png", "b.png", "deep/c.png"))
    assert sample.turns == (
        Turn("system", ("be brief",)), Turn("user", ("what ", b, " is\n", a, "?")), Turn("assistant", ("a",)),
        Turn("user", ("and ", c)), Turn("assistant", ("b <image>",)),
    )  # fmt: skip


def test_a_lone_image_of_a_message_stays_where_it_is(folder: Path):
    sample = said_by(folder, message("user", "what is <image>?"), message("assistant", "a"), image="a.png")
    assert sample.turns[0].content == ("what is ", ImageRef(folder / "a.png"), "?")


ITEMS = {
    "image": {"type": "image", "image": "a.png"},
    "path": {"type": "image", "path": "a.png"},
    "url": {"type": "image", "url": "a.png"},
    "image_url": {"type": "image_url", "image_url": {"url": "a.png"}},
    "image_url as text": {"type": "image_url", "image_url": "a.png"},
    "image_url of type image": {"type": "image", "image_url": "a.png"},
    "next": {"type": "image"},
    "next of a table": {"type": "image", "text": None, "image": None, "path": None, "url": None},
    "first that is there": {"type": "image", "image": "a.png", "path": None, "text": None},
}


@pytest.mark.parametrize("name", ITEMS)
def test_an_item_names_its_image_or_takes_the_next(folder: Path, name: str):
    parts = [
        {"type": "text", "text": "one "},
        {"type": "text", "text": "two "},
        ITEMS[name],
        {"type": "text", "text": "?"},
    ]
    waiting = {"images": ["a.png"]} if name.startswith("next") else {}
    reply = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    sample = said_by(folder, message("user", parts), message("assistant", reply), **waiting)
    assert sample.turns[0].content == ("one two ", ImageRef(folder / "a.png"), "?")
    assert sample.turns[1].content == ("a b",)


def test_items_of_videos(folder: Path):
    items = [{"type": "video"}, {"type": "video", "video": "w.mp4"}, {"type": "text", "text": "?"}]
    sample = said_by(folder, message("user", items), message("assistant", "a"), video="v.mp4")
    assert sample.turns[0].content == (VideoRef(folder / "v.mp4"), VideoRef(folder / "w.mp4"), "?")


def test_messages_out_of_a_parquet_file_are_the_same(folder: Path):
    """A table has None where an item lacks a key of another."""
    items = [{"type": "text", "text": "what is "}, {"type": "image", "image": "a.png"}]
    record = {"id": "7", "messages": [message("user", items), message("assistant", [{"type": "text", "text": "a"}])]}
    (row,) = pa.Table.from_pylist([record]).to_pylist()
    assert row["messages"][0]["content"][0] == {"type": "text", "text": "what is ", "image": None}
    assert read_messages(row, folder) == read_messages(record, folder)


def test_messages_under_another_key(folder: Path):
    turns = [message("user", "what?"), message("assistant", "that")]
    assert read_messages({"chat": turns}, folder, key="chat") == Sample(
        "?", (Turn("user", ("what?",)), Turn("assistant", ("that",)))
    )


BAD_MESSAGES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "absent": (None, {}, "`messages` must be a list of at least one message"),
    "empty": ([], {}, "`messages` must be a list of at least one message"),
    "no message": (["hi"], {}, "message 1: role='hi'; allowed are system, user, assistant"),
    "role": ([message("critic", "x")], {}, "message 1: role='critic'; allowed are system, user, assistant, tool"),
    "role of no string": ([message(["user"], "x")], {}, "message 1: role=['user']"),  # type: ignore[arg-type]
    "content": ([message("user", True)], {}, "message 1: `content` must be a string or a list of items"),
    "no content": ([message("user", "a"), {"role": "assistant"}], {}, "message 2: `content` must be"),
    "no items": ([message("user", ["a"])], {}, "message 1: `content` must be a string or a list of items"),
    "type": ([message("user", [{"type": "sound"}])], {}, "message 1: type='sound'; allowed are text (with a string)"),
    "no text": ([message("user", [{"type": "text", "text": None}])], {}, "message 1: type='text'; allowed are text"),
    "address": (
        [message("user", [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}])], {},
        "https://example.com/a.png: addresses are not fetched",
    ),
    "empty address": ([message("user", [{"type": "image_url", "image_url": None}])], {}, "`image_url` must be a path"),
    "the assistant shows": (
        [message("user", "a"), message("assistant", [{"type": "image", "image": "a.png"}])], {},
        "message 2: only the user and tools show images, here it is the assistant",
    ),
    "none left": ([message("user", [{"type": "image"}])], {}, "it shows more images than the 0 that it lists"),
    "no video left": ([message("user", [{"type": "video"}])], {}, "it shows more videos than the 0 that it lists"),
    "one too many": (
        [message("user", "a"), message("assistant", "b <image>")], {"images": ["a.png"]},
        "its text has no <image>, but the record has 1 image: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_messages_that_cannot_be_used_say_which(folder: Path, name: str):
    messages, record, said = BAD_MESSAGES[name]
    with pytest.raises(BadSample) as caught:
        read_messages({"id": "7", "messages": messages, **record}, folder)
    assert said in caught.value.reason
    assert caught.value.sample_id == "7"
