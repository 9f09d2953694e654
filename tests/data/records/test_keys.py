"""Keys of records: those that change what is learned are read or refuse the record by name; all others are passed."""

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import picture
from vlm.data.records.conversations import read_llava, read_messages
from vlm.data.records.fields import is_empty
from vlm.data.records.formats import FORMATS, read_question
from vlm.data.records.keys import unread_keys
from vlm.data.sample import BadSample, ImageRef, Sample, Turn, VideoRef


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with `a.png`, `b.png` and `v.mp4`."""
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    (tmp_path / "v.mp4").write_bytes(b"")
    return tmp_path


def chat(content: Any, reply: Any = "yes", **keys: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": reply, **keys}]


RECORDS: dict[str, dict[str, Any]] = {
    "llava": {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]},
    "messages": {"messages": chat("what?")},
    "caption": {"image": "a.png", "caption": "that"},
    "question": {"question": "what?", "answer": "that"},
    "head": {"conversations": ["what?", "that"]},
    "labelled": {"prompt": "what?", "label": "that"},
    "alpaca": {"instruction": "what?", "output": "that"},
    "cauldron": {"texts": [{"user": "what?", "assistant": "that"}]},
    "minicpm": {"conversations": chat("what?")},
    "pair": {"query": "what?", "positive": "that"},
    "preference": {"question": "what?", "chosen": "that", "rejected": "this"},
}
"""A record of every form."""

REFUSED = {
    "tools": [{"name": "f"}],
    "functions": [{}, {"name": "f"}],
    "audio": "a.wav",
    "audios": ["a.wav"],
    "objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]},
    "bbox": [1, 2, 3, 4],
    "weight": 0.5,
    "loss": 0,
    "history": [["a", "b"]],
}


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("name", FORMATS)
def test_a_key_that_changes_what_is_learned_is_refused_by_name(name: str, key: str, folder: Path):
    if (name, key) == ("alpaca", "history") or (key == "objects" and name not in ("labelled", "pair")):
        return  # the forms that read it
    if name in ("llava", "messages", "preference") and key in ("tools", "functions"):
        return  # those that read them
    record = {"id": 7, **RECORDS[name], key: REFUSED[key]}
    with pytest.raises(BadSample) as caught:
        FORMATS[name](record, folder)
    assert caught.value.reason.startswith(f"`{key}` is not read: ")
    assert f"ignore_keys=[{key}]" in caught.value.reason
    assert caught.value.sample_id == "7"
    assert FORMATS[name](record, folder, ignore_keys=[key]) == FORMATS[name]({"id": 7, **RECORDS[name]}, folder)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("labelled", "pair")])
def test_objects_can_be_ignored(name: str, folder: Path):
    record = {**RECORDS[name], "objects": {"bbox": [[1, 2, 3, 4]], "category": [1]}}
    with pytest.raises(BadSample, match=r"`objects\.category`"):
        FORMATS[name](record, folder)
    assert FORMATS[name](record, folder, ignore_keys=["objects"]) == FORMATS[name](RECORDS[name], folder)


@pytest.mark.parametrize("value", [None, "", [], {}, "[]", False, {"ref": [], "bbox": None}])
def test_a_key_whose_value_says_nothing_is_none(value: Any, folder: Path):
    assert is_empty(value)
    record = {**RECORDS["messages"], "tools": value, "objects": value, "audios": value}
    assert read_messages(record, folder) == read_messages(RECORDS["messages"], folder)


METADATA = {"source": "web", "dataset": "x", "url": "https://x.org", "width": 3, "meta": {"a": 1}, "score": 0.5}


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "head"])
def test_other_keys_are_passed_and_named(name: str, folder: Path):
    record = {**RECORDS[name], **METADATA, "weight": 1, "note": None}
    assert FORMATS[name](record, folder) == FORMATS[name](RECORDS[name], folder)
    assert unread_keys(FORMATS[name], record, {}) == [*METADATA, "weight"]
    assert unread_keys(FORMATS[name], RECORDS[name], {}) == []


def test_options_that_name_keys_are_read(folder: Path):
    record = {"photo": "a.png", "asked": "what?", "image": "z.png", "a": 1, "b": 2, "c": 3}
    options = {"image_key": "photo", "prompt_key": "asked", "label_key": ["a", "b"]}
    assert unread_keys(FORMATS["labelled"], record, options) == ["c"]
    assert unread_keys(read_messages, {"chat": chat("a", mood="x")}, {"key": "chat"}) == ["chat[].mood"]
    assert unread_keys(lambda record, folder: None, record, {}) == [], "of a user's own reader nothing is known"


TURNS = {
    "refusal": "no",
    "audio": {"id": "x"},
    "images": ["a.png"],
    "objects": {"bbox": [[1, 2, 3, 4]]},
    "train_detail": [{"end": 1}],
}


@pytest.mark.parametrize("key", TURNS)
def test_a_key_of_a_turn_that_changes_what_is_learned_is_refused(key: str, folder: Path):
    with pytest.raises(BadSample, match=rf"`messages\[\]\.{key}` is not read"):
        read_messages({"messages": chat("a", **{key: TURNS[key]})}, folder)
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: TURNS[key]}]
    with pytest.raises(BadSample, match=rf"`conversations\[\]\.{key}` is not read"):
        read_llava({"conversations": turns}, folder)
    turns[1] |= {key: None, "name": "x"}
    assert read_llava({"conversations": turns}, folder).turns[1] == Turn("assistant", ("b",))


ITEMS = ["resized_height", "min_pixels", "max_pixels", "video_start", "video_end", "fps", "nframes", "bbox"]


@pytest.mark.parametrize("key", ITEMS)
def test_a_key_of_an_item_that_changes_what_is_shown_is_refused(key: str, folder: Path):
    item = {"type": "video", "video": "v.mp4", key: 2}
    with pytest.raises(BadSample, match=rf"`messages\[\]\.content\[\]\.{key}` is not read"):
        read_messages({"messages": chat([item])}, folder)
    item[key] = None
    assert read_messages({"messages": chat([item])}, folder).videos == [VideoRef(folder / "v.mp4")]


@pytest.mark.parametrize("name", ["llava", "messages", "question", "head", "labelled"])
@pytest.mark.parametrize("key", ["image_path", "img", "image_url", "video_path"])
def test_a_record_is_not_learned_without_the_image_that_it_names_otherwise(name: str, key: str, folder: Path):
    record = {**RECORDS[name], key: "a.png"}
    with pytest.raises(BadSample, match=f"it shows no (image|video), and `{key}` is not read"):
        FORMATS[name](record, folder)
    assert not FORMATS[name](record, folder, ignore_keys=key).media


def test_images_under_two_keys_that_differ_are_refused(folder: Path):
    record = {**RECORDS["question"], "image": "a.png", "images": ["a.png", "b.png"]}
    with pytest.raises(BadSample, match="it has both `image` and `images`, which differ"):
        read_question(record, folder)
    assert read_question({**record, "images": ["a.png"]}, folder).images == [ImageRef(folder / "a.png")]
    assert len(read_question({**record, "image": None}, folder).images) == 2


# Replies that are not learned


@pytest.mark.parametrize("keys", [{"weight": 0}, {"loss": False}, {"weight": 0.0, "loss": False}, {"train": False}])
def test_a_reply_may_be_left_out_of_what_is_learned(keys: dict[str, Any], folder: Path):
    kept = chat("c", "d", weight=1, loss=True)
    sample = read_messages({"messages": [*chat("a", "b", **keys), *kept]}, folder)
    assert [turn.supervised for turn in sample.turns] == [True, False, True, True]
    turns = [{"from": "human", "value": "a", "loss": False}, {"from": "gpt", "value": "b", **keys}]
    assert read_llava({"conversations": turns}, folder).turns[1] == Turn("assistant", ("b",), supervised=False)


BAD_WEIGHTS = {
    "below zero": ({"weight": -0.5}, r"message 2: weight=-0.5; allowed are true, false, 0, or"),
    "no number": ({"weight": float("nan")}, "message 2: weight=nan; allowed are true, false"),
    "endless": ({"loss": float("inf")}, "message 2: loss=inf; allowed are true, false"),
    "two weights": ({"weight": 0.5, "loss": 2}, "message 2: weight=0.5, loss=2 contradict each other"),
    "a text": ({"loss": "false"}, "message 2: loss='false'; allowed are true, false"),
    "both": ({"weight": 1, "loss": False}, "message 2: weight=1, loss=False contradict each other"),
}


@pytest.mark.parametrize("key", ["weight", "loss", "loss_scale", "train", "training"])
@pytest.mark.parametrize("form", ["llava", "messages"])
def test_a_reply_has_a_weight(form: str, key: str, folder: Path):
    for value, learned, weight in ((0.5, True, 0.5), (2, True, 2.0), (True, True, 1.0), (0, False, 1.0)):
        record = {"messages": chat("a", "b", **{key: value})}
        if form == "llava":
            record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: value}]}
        turn = FORMATS[form](record, folder).turns[1]
        assert (turn.supervised, turn.weight) == (learned, weight)


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_a_weight_that_is_neither_is_refused(name: str, folder: Path):
    keys, said = BAD_WEIGHTS[name]
    with pytest.raises(BadSample, match=said):
        read_messages({"messages": chat("a", "b", **keys)}, folder)


def test_only_replies_are_learned(folder: Path):
    messages = [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadSample, match="message 1: weight=1 of the user's turn; only replies are trained on"):
        read_messages({"messages": messages}, folder)


# Items


@pytest.mark.parametrize(("order", "names"), [([1, 0], "ba"), ([0, 0, 1], "aab")])
def test_an_item_names_an_image_by_its_index(order: list[int], names: str, folder: Path):
    items = [{"type": "image", "index": index, "text": None} for index in order]
    record = {"images": ["a.png", "b.png"], "messages": chat([*items, {"type": "text", "text": "?", "index": None}])}
    assert read_messages(record, folder).images == [ImageRef(folder / f"{name}.png") for name in names]


BAD_ITEMS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "beyond": ([{"type": "image", "index": 2}], "index=2 of an image item: the record lists 2, counted from 0"),
    "before": ([{"type": "image", "index": -1}], "index=-1 of an image item"),
    "a text": ([{"type": "image", "index": "0"}], "index='0' of an image item"),
    "one without": ([{"type": "image", "index": 0}, {"type": "image"}], "have an `index` and some do not"),
    "one with": ([{"type": "image"}, {"type": "image", "index": 1}], "have an `index` and some do not"),
    "unused": ([{"type": "image", "index": 0}], "1 of the 2 images that it lists do not occur in its text"),
    "nowhere": (
        [{"type": "text", "text": "<image><image>"}],
        "2 of the 2 images that it lists do not occur in its text",
    ),
    "a file too": ([{"type": "image", "index": 0, "path": "a.png"}], "both an `index` and a file"),
    "text in an image": ([{"type": "image", "text": "this"}], "an item of type image has `text` too"),
    "an image in a text": ([{"type": "text", "text": "a", "image": "a.png"}], "an item of type text has `image` too"),
    "a source of no kind": ([{"type": "image", "source": {"type": "file", "file_id": "x"}}], "`source` of an item"),
    "a source elsewhere": ([{"type": "image", "source": {"type": "url", "url": "https://x.org/a"}}], "are not fetched"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_an_item_that_cannot_be_read_exactly_is_refused(name: str, folder: Path):
    items, said = BAD_ITEMS[name]
    with pytest.raises(BadSample) as caught:
        read_messages({"images": ["a.png", "b.png"], "messages": chat(items)}, folder)
    assert said in caught.value.reason


def test_items_of_anthropic_hold_their_image(folder: Path):
    content = (folder / "a.png").read_bytes()
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(content).decode()}
    items = [{"type": "image", "source": source}, {"type": "text", "text": "What does <image> do?"}]
    sample = read_messages({"system": [{"type": "text", "text": "Be brief."}], "messages": chat(items)}, folder)
    assert sample.turns[:2] == (
        Turn("system", ("Be brief.",)),
        Turn("user", (ImageRef(None, content), "What does <image> do?")),
    )


def test_items_of_video_urls_are_videos(folder: Path):
    sample = read_messages({"messages": chat([{"type": "video_url", "video_url": {"url": "v.mp4"}}])}, folder)
    assert sample.videos == [VideoRef(folder / "v.mp4")]


# Words, boxes, system turns, beginnings


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "pair"])
def test_words_of_a_record_are_no_marks(name: str, folder: Path):
    """With an image and, in the forms that need none, without one."""
    asked = "What does the HTML tag <image> do, and <video>?"
    keys = {"caption": "caption", "question": "question", "labelled": "prompt", "preference": "question"}
    shown = {"llava": f"<image>\n{asked}", "messages": f"<image>\n{asked}"}.get(name, asked)
    for text, image in ((asked, None), (shown, "a.png")):
        values = {"llava": [{"from": "human", "value": text}], "head": [text, "yes"]}
        record = {**RECORDS[name], keys.get(name, "conversations"): values.get(name, text), "image": image}
        if name == "messages":
            record |= {"messages": chat(text), "conversations": None}
        elif name in ("alpaca", "cauldron", "minicpm"):
            record = {"image": image} | {
                "alpaca": {"instruction": text, "output": "that"},
                "cauldron": {"texts": [{"user": text, "assistant": "that"}]},
                "minicpm": {"conversations": chat(text)},
            }[name]
        if name == "caption" and image is None:
            continue
        sample: Sample = FORMATS[name](record, folder)
        texts = "".join(part for turn in sample.turns for part in turn.content if isinstance(part, str))
        assert asked in texts
        assert texts.count("<image>") == 1
        assert len(sample.images) == (image is not None)


@pytest.mark.parametrize("mark", ["<bbox>", "<ref-object>"])
def test_marks_of_boxes_beside_an_image_are_refused(mark: str, folder: Path):
    for messages in (chat(f"<image>find {mark}"), chat("<image>find it", f"here: {mark}")):
        with pytest.raises(BadSample, match=f"its text has {mark}, but the record has no `objects`"):
            read_messages({"image": "a.png", "messages": messages}, folder)
    assert read_messages({"messages": chat(f"What is {mark}?")}, folder).turns[0].content == (f"What is {mark}?",)


def test_marks_of_other_tools_are_refused_with_the_mark_to_write(folder: Path):
    for record in ({"image": "a.png", "messages": chat("<|image_pad|>what?")}, {"messages": chat("<ImageHere>what?")}):
        with pytest.raises(BadSample, match=r"<(\|image_pad\||ImageHere)>\)? ?(is|,) a mark of another tool"):
            read_messages(record, folder)
    assert read_messages({"image": "a.png", "messages": chat("<image>What is <|image_pad|>?")}, folder).images


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "pair"])
def test_a_system_prompt_beside_the_turns_is_a_turn(name: str, key: str, folder: Path):
    sample = FORMATS[name]({**RECORDS[name], key: "Be brief."}, folder)
    assert sample.turns == (Turn("system", ("Be brief.",)), *FORMATS[name](RECORDS[name], folder).turns)
    with pytest.raises(BadSample, match="`system` must be a string, got 3"):
        FORMATS[name]({**RECORDS[name], key: 3}, folder)


def test_two_system_prompts_are_refused(folder: Path):
    messages = [{"role": "system", "content": "Be brief."}, *chat("a")]
    with pytest.raises(BadSample, match="it has `system` and a system turn, which differ"):
        read_messages({"system": "Be long.", "messages": messages}, folder)
    assert len(read_messages({"system": "Be brief.", "messages": messages}, folder).turns) == 3


def test_a_conversation_that_begins_with_the_assistant_is_refused(folder: Path):
    for lead in ([], [{"role": "system", "content": "s"}]):
        messages = [*lead, {"role": "assistant", "content": "Hello!"}, *chat("a")]
        with pytest.raises(BadSample, match="it begins with the assistant"):
            read_messages({"messages": messages}, folder)
    turns = [{"from": "gpt", "value": "Hello!"}, *RECORDS["llava"]["conversations"]]
    with pytest.raises(BadSample, match="it begins with the assistant"):
        read_llava({"conversations": turns}, folder)


def test_rates_and_times_of_extracted_frames_are_read():
    record = {**RECORDS["messages"], "videos": [["a.png", "b.png"]], "times": [0, 1], "fps": None, "mood": "x"}
    assert unread_keys(read_messages, record, {}) == ["mood"]
