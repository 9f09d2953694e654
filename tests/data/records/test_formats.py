"""Readers: records of every format as samples, and errors that name the record."""

import base64
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.tiny_parts import picture
from vlm.config.named import permit_names
from vlm.data.records.formats import (
    CHOICE_INSTRUCTION,
    FORMATS,
    get_reader,
    read_caption,
    read_head,
    read_labelled,
    read_llava,
    read_messages,
    read_question,
)
from vlm.data.records.index import parse_record
from vlm.data.sample import ROLES, BadSample, ImageRef, OverLong, Sample, Turn, VideoRef
from vlm.data.tools.forms import FORMS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with `a.png`, `b.png`, `deep/c.png`, `v.mp4` and `w.mp4`; `outside.png` stands beside it."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.png", "../outside.png"):
        picture().save(images / name)
    for name in ("v.mp4", "w.mp4"):
        (images / name).write_bytes(b"")
    return images


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


def test_errors_are_value_errors():
    assert issubclass(OverLong, BadSample)
    assert issubclass(BadSample, ValueError)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("record", [None, 3, "text", ["x"]])
def test_what_is_no_mapping_is_refused_by_every_reader(name: str, record: Any, folder: Path):
    with pytest.raises(BadSample, match=f"each record must be a JSON object, got {type(record).__name__}"):
        FORMATS[name](record, folder)


WHOLE: dict[str, dict[str, Any]] = {
    "llava": {"conversations": talk("<image>\nwhat?", "that")},
    "messages": {"messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "that"}]},
    "caption": {"caption": "that"},
    "question": {"question": "what?", "answer": "that"},
    "head": {"conversations": ["what?", "that"]},
    "labelled": {"prompt": "what?", "label": "that"},
    "alpaca": {"instruction": "what?", "input": "", "output": "that"},
    "cauldron": {"texts": [{"user": "what?", "assistant": "that", "source": "x"}]},
    "minicpm": {"conversations": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]},
}


@pytest.mark.parametrize("name", WHOLE)
def test_images_come_in_every_form_to_every_reader(name: str, folder: Path):
    content = (folder / "a.png").read_bytes()
    given = [
        ("a.png", ImageRef(folder / "a.png")),
        (["deep/c.png"], ImageRef(folder / "deep/c.png")),
        (f"data:image/png;base64,{base64.b64encode(content).decode()}", ImageRef(None, content)),
        ({"bytes": content, "path": None}, ImageRef(None, content)),
        ({"bytes": content, "path": "x.png"}, ImageRef(Path("x.png"), content)),
        ({"bytes": None, "path": "a.png"}, ImageRef(folder / "a.png")),
        (content, ImageRef(None, content)),
        ([content], ImageRef(None, content)),
        (base64.b64encode(content).decode(), ImageRef(None, content)),
        (base64.encodebytes(content).decode(), ImageRef(None, content)),
        (base64.urlsafe_b64encode(content).decode().rstrip("="), ImageRef(None, content)),
        ({"bytes": base64.b64encode(content).decode()}, ImageRef(None, content)),
        (f"data:;base64,{base64.b64encode(content).decode()}", ImageRef(None, content)),
    ]
    for value, found in given:
        sample = FORMATS[name]({**WHOLE[name], "image": value}, folder)
        assert sample.images == [found]
        if name == "labelled":
            assert (sample.turns[-1].role, sample.label) == ("user", "that")
        else:
            assert sample.turns[-1] == Turn("assistant", ("that",))


REFUSED_PATHS = {
    "https://example.com/a.png": "addresses are not fetched in training",
    "../outside.png": "leaves the image folder",
    "z.png": "z.png does not exist",
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("path", REFUSED_PATHS)
def test_every_reader_refuses_a_path_that_is_no_image_of_the_folder(name: str, path: str, folder: Path):
    with pytest.raises(BadSample, match=REFUSED_PATHS[path]) as caught:
        FORMATS[name]({**WHOLE[name], "id": 12, "image": path}, folder)
    assert (caught.value.sample_id, caught.value.file) == ("12", path)


# Videos, in the readers whose text has placeholders


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


@pytest.mark.parametrize("written", ["3", "-7", "2.50", "1e-07", "0.1", "12345678901234567890", "1.0"])
def test_a_number_in_place_of_a_text_is_read_as_it_is_written(written: str):
    """In turns, messages and their items, pairs and answers; truth values and what is no finite number are not."""
    forms = {
        "llava": '{"conversations": [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": %s}]}',
        "messages": '{"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": %s}]}',
        "minicpm": '{"conversations": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": %s}]}',
        "cauldron": '{"texts": [{"user": "how many?", "assistant": %s}]}',
        "head": '{"conversations": ["how many?", %s]}',
        "question": '{"question": "how many?", "answer": %s}',
    }
    for name, form in forms.items():
        for number, accepted in ((written, True), ("true", False), ("NaN", False), ("1e999", False)):
            record = parse_record((form % number).encode())
            if accepted:
                assert FORMATS[name](record, Path()).turns[-1].content == (written,), name
            else:
                with pytest.raises(BadSample):
                    FORMATS[name](record, Path())
    item = [{"role": "user", "content": [{"type": "text", "text": parse_record(written.encode())}]}]
    assert FORMATS["messages"]({"messages": item}, Path()).turns[0].content == (written,)


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


# Captions


def test_a_caption_is_a_reply_to_its_image(folder: Path):
    record = {"image_id": 9, "jpg": ["a.png", "b.png"], "text": "two"}
    seen = (ImageRef(folder / "a.png"), ImageRef(folder / "b.png"))
    bare = read_caption(record, folder, image_key="jpg", caption_key="text")
    assert bare == Sample("9", (Turn("user", seen), Turn("assistant", ("two",))))
    asked = read_caption(record, folder, image_key="jpg", caption_key="text", prompt="Describe it.")
    assert asked.turns[0].content == (*seen, "\nDescribe it.")


def test_one_of_several_prompts_is_drawn_by_the_caption(folder: Path):
    prompts = ["a", "b", "c"]

    def asked(caption: str) -> Any:
        return read_caption({"image": "a.png", "caption": caption}, folder, prompt=prompts).turns[0].content[1]

    drawn = [asked(str(number)) for number in range(60)]
    assert {*drawn} == {"\na", "\nb", "\nc"}
    assert drawn == [asked(str(number)) for number in range(60)]


BAD_CAPTIONS = {
    "no picture": ({"caption": "a"}, "`image` must name an image"),
    "an empty list": ({"image": [], "caption": "a"}, "`image` must name an image"),
    "a number": ({"image": 3, "caption": "a"}, "`image` must be a path or a list of paths, got 3"),
    "no caption": ({"image": "a.png", "text": "a"}, "`caption` must be a string, got None; it has id, image, text"),
    "captions": ({"image": "a.png", "caption": ["a"]}, "`caption` must be a string, got ['a']"),
}


@pytest.mark.parametrize("name", BAD_CAPTIONS)
def test_a_caption_that_cannot_be_used_says_why(folder: Path, name: str):
    record, said = BAD_CAPTIONS[name]
    with pytest.raises(BadSample) as caught:
        read_caption({"id": 7, **record}, folder)
    assert said in caught.value.reason


# Questions


def asked(folder: Path, options: dict[str, Any] | None = None, **record: Any) -> tuple[Any, str]:
    """What the user says, and the reply."""
    sample = read_question({"question": "which?", **record}, folder, **options or {})
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]
    (reply,) = sample.turns[1].content
    assert isinstance(reply, str)
    return sample.turns[0].content, reply


CHOICES = {"number": 1, "letter": "B", "text": "dog"}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_given_by_number_letter_or_text(folder: Path, name: str):
    said, reply = asked(folder, image="a.png", choices=["cat", "dog"], answer=CHOICES[name])
    assert said == (ImageRef(folder / "a.png"), f"\nwhich?\nA. cat\nB. dog\n{CHOICE_INSTRUCTION}")
    assert reply == "B"


def test_a_number_that_counts_no_choice_is_the_text_of_one(folder: Path):
    assert asked(folder, choices=["10", "20"], answer=20)[1] == "B"
    assert asked(folder, choices=["1", "0"], answer=1)[1] == "B", "its number counts first"


def test_a_choice_whose_text_is_a_letter_is_meant_by_its_text(folder: Path):
    assert asked(folder, choices=["B", "A"], answer="B")[1] == "A"


def test_the_last_line_of_a_question_can_be_set(folder: Path):
    options = {"instruction": "One word.", "choice_instruction": "Letter!"}
    assert asked(folder, options, answer="x")[0] == ("which?\nOne word.",)
    assert asked(folder, options, answer="x", choices=["x"])[0] == ("which?\nA. x\nLetter!",)
    assert asked(folder, answer="x")[0] == ("which?",)


ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "a string": ({"answer": "two"}, "two"),
    "a list": ({"answer": ["one", "two", "two"]}, "two"),
    "the first of equals": ({"answers": ["b", "a", "a", "b"]}, "b"),
    "as VQA has them": ({"answer": None, "answers": [{"answer": "x", "answer_id": 1}, {"answer": "x"}]}, "x"),
    "no choices": ({"answer": "two", "choices": []}, "two"),
    "choices of a table": ({"answer": "two", "choices": None}, "two"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_of_several_answers_the_commonest_counts(folder: Path, name: str):
    record, reply = ANSWERS[name]
    assert asked(folder, **record) == (("which?",), reply)


def test_what_people_answered_are_references_beside_the_reply(folder: Path):
    """In every form but `labelled`; a single answer is none, nor is the text of a choice, whose letter counts."""
    turns = {"conversations": [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "two"}]}
    messages = {"messages": [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "two"}]}
    forms = {
        "llava": turns, "messages": messages, "question": {"question": "which?"},
        "caption": {"image": "a.png", "caption": "two"}, "head": {"conversations": ["which?", "two"]},
    }  # fmt: skip
    for name, record in forms.items():
        given = {**record, "answers": [{"answer": "two"}, {"answer": "2"}]}
        assert FORMATS[name](given, folder).references == ("two", "2"), name
        without = {**record, "answer": "two"}
        assert FORMATS[name](without, folder).references == (), name
    asked_of_many = {"question": "which?", "answer": ["two", "2", "two"]}
    assert FORMATS["question"](asked_of_many, folder).references == ("two", "2", "two")
    choice = {"question": "which?", "answer": 0, "answers": ["two"], "choices": ["two", "three"]}
    assert FORMATS["question"](choice, folder).references == ()
    with pytest.raises(BadSample, match="must be a string or a list of strings"):
        FORMATS["llava"]({**turns, "answers": [None]}, folder)


NUMBERS: list[tuple[Any, str]] = [
    (3, "3"),
    (2.5, "2.5"),
    (-0.1, "-0.1"),
    (1e-7, "1e-07"),
    (10**25, "1" + "0" * 25),
    (Decimal("2.50"), "2.50"),
    ("2.50", "2.50"),
]


@pytest.mark.parametrize(("number", "text"), NUMBERS)
def test_a_number_is_the_text_that_writes_it(folder: Path, number: Any, text: str):
    """Where a string is needed: as Parquet and JSON hold captions, answers and choices that are numbers."""
    caption = FORMATS["caption"]({"image": "a.png", "caption": number}, folder)
    answer = FORMATS["question"]({"question": number, "answer": number}, folder)
    of_many = FORMATS["question"]({"question": "how many?", "answers": [{"answer": number}, number]}, folder)
    chosen = FORMATS["question"]({"question": "how many?", "choices": [number, "x"], "answer": text}, folder)
    assert caption.turns[-1].content == answer.turns[-1].content == answer.turns[0].content == (text,)
    assert of_many.references == (text, text)
    assert chosen.turns[-1].content == ("A",)


def test_a_number_of_32_bits_has_the_digits_that_tell_it(folder: Path):
    column = pa.array([0.1, 2.5, 1e10, 2.0**32, 123456.789, 3.4e38], pa.float32()).to_pylist()
    captions = [
        FORMATS["caption"]({"image": "a.png", "caption": number}, folder).turns[-1].content for number in column
    ]
    assert captions == [("0.1",), ("2.5",), ("10000000000.0",), ("4294967296.0",), ("123456.79",), ("3.4e+38",)]


@pytest.mark.parametrize("value", [True, None, float("nan"), [1], {"a": 1}, b"x"])
def test_what_is_neither_text_nor_number_is_no_caption(folder: Path, value: Any):
    with pytest.raises(BadSample, match="`caption` must be a string, got"):
        FORMATS["caption"]({"image": "a.png", "caption": value}, folder)


def test_question_and_answer_may_stand_under_other_keys(folder: Path):
    record = {"query": "what?", "response": "that", "answer": "another"}
    sample = FORMATS["question"](record, folder, question_key="query", answer_key="response")
    assert [turn.content for turn in sample.turns] == [("what?",), ("that",)]


def test_images_stand_before_a_question_or_within_it(folder: Path):
    a, b, v = ImageRef(folder / "a.png"), ImageRef(folder / "b.png"), VideoRef(folder / "v.mp4")
    both = {"images": ["a.png", "b.png"], "answer": "x"}
    assert asked(folder, **both, video="v.mp4")[0] == (v, a, b, "\nwhich?")
    assert asked(folder, **both, question="is <image> or <image>?")[0] == ("is ", a, " or ", b, "?")
    assert asked(folder, image="a.png", answer="x", question="is it this?\n<image>")[0] == (a, "\nis it this?")


BAD_QUESTIONS = {
    "no question": ({"question": None, "answer": "a"}, "`question` must be a string, got None"),
    "no answer": ({}, "`answer` must be a string or a list of strings, got None"),
    "empty list": ({"answer": []}, "`answer` must be a string or a list of strings, got []"),
    "truth values": ({"answer": [True]}, "`answer` must be a string or a list of strings, got [True]"),
    "answers without text": ({"answers": [{"text": "a"}]}, "`answer` must be a string or a list of strings"),
    "choices of no list": ({"choices": "cat", "answer": 0}, "`choices` must be a list of strings"),
    "choices of lists": ({"choices": [[1], [2]], "answer": 0}, "`choices` must be a list of strings"),
    "a choice or its number": (
        {"choices": [1, 2], "answer": 1},
        "answer=1 is one of the choices and the number of another",
    ),
    "too many choices": ({"choices": ["x"] * 27, "answer": 0}, "27 choices, but there are letters for 26"),
    "beyond": ({"choices": ["cat", "dog"], "answer": 2}, "answer=2; it must be one of the choices, its number from 0"),
    "before": ({"choices": ["cat", "dog"], "answer": -1}, "answer=-1; it must be one of the choices"),
    "true": ({"choices": ["cat", "dog"], "answer": True}, "answer=True; it must be one of the choices"),
    "another letter": ({"choices": ["cat", "dog"], "answer": "C"}, "answer='C'; it must be one of the choices"),
    "two letters": ({"choices": ["cat", "dog"], "answer": "AB"}, "answer='AB'; it must be one of the choices"),
    "nothing": ({"choices": ["cat", "dog"], "answer": ""}, "answer=''; it must be one of the choices"),
    "too many images": (
        {"question": "<image>?", "answer": "a", "images": ["a.png", "b.png"]},
        "but the record has 2 images",
    ),
    "too few images": ({"question": "<image><image>?", "answer": "a", "image": "a.png"}, "its text has 2 <image>"),
}


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_a_question_that_cannot_be_used_says_why(folder: Path, name: str):
    record, said = BAD_QUESTIONS[name]
    with pytest.raises(BadSample) as caught:
        read_question({"question_id": 7, "question": "which?", **record}, folder)
    assert said in caught.value.reason
    assert caught.value.sample_id == "7"


# Prompt and answer


def test_a_prompt_and_its_answer(folder: Path):
    a, b, v = ImageRef(folder / "a.png"), ImageRef(folder / "b.png"), VideoRef(folder / "v.mp4")
    record = {"source": "s1", "images": ["a.png", "b.png"], "videos": ["v.mp4"], "conversations": ["which?", "that"]}
    assert read_head(record, folder) == Sample(
        "s1", (Turn("user", (v, a, b, "\nwhich?")), Turn("assistant", ("that",))), label=0
    )
    within = {**record, "conversations": ["<video> <image>, <image>?", "that"], "system_prompt": "be brief"}
    assert read_head(within, folder).turns[:2] == (
        Turn("system", ("be brief",)),
        Turn("user", (v, " ", a, ", ", b, "?")),
    )


@pytest.mark.parametrize("prompt", [None, ""])
def test_an_empty_system_prompt_is_none(folder: Path, prompt: str | None):
    record = {"conversations": ["which?", "that"], "system_prompt": prompt, "images": [], "videos": []}
    assert read_head(record, folder) == Sample("?", (Turn("user", ("which?",)), Turn("assistant", ("that",))), 0)


@pytest.mark.parametrize("turns", [None, "ab", ["a"], ["a", "b", "c"], ["a", None], talk("a", "b")])
def test_a_prompt_without_its_answer_is_refused(folder: Path, turns: Any):
    with pytest.raises(BadSample, match="`conversations` must be a prompt and an answer, both strings"):
        read_head({"conversations": turns}, folder)


# Labels


UNANSWERED: dict[str, dict[str, Any]] = {
    "llava": {"conversations": talk("what?")},
    "messages": {"messages": [{"role": "user", "content": "what?"}]},
    "question": {"question": "what?"},
    "question with choices": {"question": "what?", "choices": ["a cat", "a dog"]},
    "labelled": {"prompt": "what?"},
}


@pytest.mark.parametrize("name", UNANSWERED)
@pytest.mark.parametrize("label", [0, False, "", [], 1.5, {"a": 1, "b": None}])
def test_a_record_with_a_label_needs_no_reply(folder: Path, name: str, label: Any):
    sample = FORMATS[name.split()[0]]({**UNANSWERED[name], "label": label, "group": 3}, folder)
    assert [turn.role for turn in sample.turns] == ["user"]
    assert (sample.label, sample.group) == (label, "3")


@pytest.mark.parametrize("name", WHOLE)
def test_every_reader_takes_label_and_group(folder: Path, name: str):
    record = {**WHOLE[name], "image": "a.png", "label": "x", "group": "g"}
    assert (FORMATS[name](record, folder).label, FORMATS[name](record, folder).group) == ("x", "g")
    assert FORMATS[name]({**record, "group": None}, folder).group is None


@pytest.mark.parametrize("name", ["llava", "messages", "caption", "question"])
def test_without_a_label_there_is_none(folder: Path, name: str):
    sample = FORMATS[name]({**WHOLE[name], "image": "a.png", "label": None}, folder)
    assert (sample.label, sample.group) == (None, None)


@pytest.mark.parametrize(
    ("answer", "label"),
    [("yes", 1), (" Yes, it is.", 1), ("1", 1), (" 1\n", 1), ("10", 0), ("no", 0), ("", 0), ("oh yes", 0)],
)
def test_an_answer_of_yes_or_1_is_the_positive_label(folder: Path, answer: str, label: int):
    assert read_head({"conversations": ["which?", answer]}, folder).label == label
    assert read_head({"conversations": ["which?", answer], "label": 0.5}, folder).label == 0.5


def test_a_prompt_with_its_label(folder: Path):
    a, b = ImageRef(folder / "a.png"), ImageRef(folder / "b.png")
    record = {"id": 7, "image": ["a.png", "b.png"], "prompt": "which?", "label": "cat", "group": 1}
    assert read_labelled(record, folder) == Sample("7", (Turn("user", (a, b, "\nwhich?")),), "cat", "1")
    within = {"image": ["a.png", "b.png"], "prompt": "is <image> like <image>?"}
    assert read_labelled(within, folder) == Sample("?", (Turn("user", ("is ", a, " like ", b, "?")),))
    assert read_labelled({"prompt": "which?"}, folder) == Sample("?", (Turn("user", ("which?",)),))
    assert read_labelled({"image": "a.png", "prompt": ""}, folder).turns == (Turn("user", (a,)),)
    assert read_labelled({"images": ["b.png"], "prompt": "which?"}, folder).images == [b]


def test_columns_of_other_names(folder: Path):
    keys = {"image_key": "photo", "prompt_key": "asked", "label_key": "kind", "group_key": "who"}
    record = {"photo": "a.png", "asked": "which?", "kind": 2, "who": "x", "image": "z.png", "label": 9, "group": 9}
    sample = read_labelled(record, folder, **keys)
    assert sample == Sample("?", (Turn("user", (ImageRef(folder / "a.png"), "\nwhich?")),), 2, "x")
    assert read_labelled({**record, "photo": None}, folder, **keys).turns == (Turn("user", ("which?",)),)


def test_a_prompt_for_records_that_have_none(folder: Path):
    for record in ({"image": "a.png"}, {"image": "a.png", "prompt": None}):
        assert read_labelled(record, folder, prompt="Describe.").turns[0].content[1] == "\nDescribe."
    assert read_labelled({"prompt": "which?"}, folder, prompt="Describe.").turns[0].content == ("which?",)


def test_several_columns_are_a_mapping(folder: Path):
    def label(**record: Any) -> Any:
        return read_labelled({"prompt": "which?", **record}, folder, label_key=["a", "b"]).label

    assert label(a=0, b="x", c=1) == {"a": 0, "b": "x"}
    assert label(a=None, b="x") == {"b": "x"}
    assert label(c=1) is None


@pytest.mark.parametrize(
    ("text", "label"), [("a;b", ["a", "b"]), (" a ; b;", ["a", "b"]), ("a", ["a"]), ("", []), (";", []), (3, 3)]
)
def test_a_label_of_text_is_split(folder: Path, text: Any, label: Any):
    record = {"prompt": "which?", "label": text}
    assert read_labelled(record, folder, label_separator=";").label == label
    assert read_labelled(record, folder).label == text
    several = read_labelled({**record, "other": "x"}, folder, label_key=["label", "other"], label_separator=";")
    assert several.label == {"label": label, "other": ["x"]}


@pytest.mark.parametrize("form", FORMS)
def test_label_and_group_are_written_and_read_back(folder: Path, form: str):
    record = {"id": "7", "image": "a.png", "prompt": "<image>\nwhich?", "label": ["x"], "group": "g"}
    sample = read_labelled(record, folder)
    assert FORMATS[form](FORMS[form](sample, folder), folder) == sample
    assert not {"label", "group"} & FORMS[form](read(folder, "what?", "that"), folder).keys()


BAD_LABELLED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no prompt": ({"image": "a.png"}, {}, "`prompt` must be a string, got None; it has id, image"),
    "a prompt of another kind": ({"prompt": [3]}, {"prompt": "x"}, "`prompt` must be a string, got [3]"),
    "nothing": ({"prompt": ""}, {}, "it has neither an image nor a prompt"),
    "no column": ({"image": "a.png", "prompt": "x"}, {"image_key": "photo"}, "`photo` is not there; it has id, image,"),
    "too many images": ({"image": ["a.png", "b.png"], "prompt": "<image>?"}, {}, "but the record has 2 images"),
    "too few images": ({"image": "a.png", "prompt": "<image><image>"}, {}, "its text has 2 <image>"),
}


@pytest.mark.parametrize("name", BAD_LABELLED)
def test_a_labelled_record_that_cannot_be_used_says_why(folder: Path, name: str):
    record, options, said = BAD_LABELLED[name]
    with pytest.raises(BadSample) as caught:
        read_labelled({"id": 7, **record}, folder, **options)
    assert said in caught.value.reason
    assert caught.value.sample_id == "7"


# Which reader


def test_a_reader_of_the_users_own_is_named_by_its_function():
    permit_names(["vlm.data.records.formats:read_llava"])
    assert get_reader("llava") is read_llava
    assert get_reader("vlm.data.records.formats:read_llava") is read_llava


@pytest.mark.parametrize("name", ["no.such.module:read", "vlm.data.records.formats:read_nothing"])
def test_a_reader_that_does_not_exist_is_refused_by_key(name: str):
    permit_names([name])
    with pytest.raises(ValueError, match=f"dataset.format={name}: "):
        get_reader(name)
