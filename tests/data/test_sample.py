"""The in-memory form of records."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlm.data.sample import BadSample, Clip, ImageRef, OverLong, Picture, Sample, Turn, Video, VideoRef, group_reasons

IMAGE, VIDEO = ImageRef(Path("a.png")), VideoRef(Path("b.mp4"))
SAMPLE = Sample("7", (Turn("user", (IMAGE, "what?", VIDEO)), Turn("assistant", ("a cat",))))


def test_readers_that_people_have_written_find_the_former_names():
    assert (Picture, Video) == (ImageRef, VideoRef)


def test_media_are_in_the_order_of_the_text():
    assert SAMPLE.images == [IMAGE]
    assert SAMPLE.videos == [VIDEO]
    assert SAMPLE.media == [IMAGE, VIDEO]


def test_a_message_has_a_token_for_each_image_and_video():
    turn = SAMPLE.turns[0]
    assert turn.as_message("<image>", "<video>") == {"role": "user", "content": "<image>what?<video>"}
    assert turn.as_message("<image>") == {"role": "user", "content": "<image>what?<image>"}


def test_videos_are_replaced_where_they_stand():
    frames = (ImageRef(VIDEO.path, frame=0), ImageRef(VIDEO.path, frame=5))
    shown = SAMPLE.with_videos(lambda video: frames)
    assert shown.turns[0].content == (IMAGE, "what?", *frames)
    assert shown.turns[1] == SAMPLE.turns[1]
    clip = VideoRef(VIDEO.path, Clip((0, 5), 10, 30, 40, 24.0))
    assert SAMPLE.with_videos(lambda video: (clip,)).videos == [clip]
    assert shown.with_videos(lambda video: ()) is shown


def test_an_image_says_where_it_is():
    assert str(IMAGE) == "a.png"
    assert str(ImageRef(VIDEO.path, frame=3)) == "b.mp4, frame 3"
    assert str(ImageRef(content=b"x")) == "in the record itself"


def test_errors_come_out_of_a_data_worker_whole():
    for kind in (BadSample, OverLong):
        error = pickle.loads(pickle.dumps(kind("7", "too long", "a.png")))
        assert (type(error), error.sample_id, error.reason, error.file) == (kind, "7", "too long", "a.png")
        assert str(error) == "record '7': too long"


HALF = "a \ud83d b"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"turns": (Turn("user", ("what?",)), Turn("assistant", (HALF,)))}, r"turn 2 \(assistant\)"),
        ({"turns": (Turn("user", (ImageRef(Path("\udcff.png")), "?")),)}, r"turn 1 \(user\): the name of a file"),
        ({"id": HALF}, "id"),
        ({"label": {"kind": ["x", HALF]}}, r"label.kind\[1\]"),
        ({"label": {HALF: 1}}, r"label.a \\ud83d b"),
        ({"group": HALF}, "group"),
        ({"references": ("x", HALF)}, r"references\[1\]"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_by_its_place(changes: dict[str, Any], place: str):
    with pytest.raises(BadSample, match=f"{place} has half of a surrogate pair") as refused:
        replace(SAMPLE, **changes)
    str(refused.value).encode()
    json.dumps(vars(refused.value), ensure_ascii=False).encode()


def test_whole_emoji_stay():
    assert replace(SAMPLE, id="👩\u200d👧 é", label="漢").id == "👩\u200d👧 é"


def test_a_message_shows_the_ends_of_what_is_long():
    error = BadSample("7" * 40_000, f"`image` is {'A' * 40_000}, no path", "A" * 40_000)
    assert len(str(error)) < 500
    assert error.reason.startswith("`image` is AAAA")
    assert error.reason.endswith("AAA, no path")
    assert len(str(error.file)) < 300
    assert error.sample_id == "7" * 40_000


def test_a_reason_has_no_address_in_memory():
    error = BadSample("7", f"its reader raised ValueError: {object()} and <f at 0x7f00deadbeef>")
    assert error.reason == "its reader raised ValueError: <object object> and <f>"
    assert str(error) == f"record '7': {error.reason}"
    assert BadSample("7", "the text says at 0x41").reason == "the text says at 0x41"


def test_reasons_are_counted_without_their_files_and_numbers():
    problems = [
        BadSample("1", "image /a folder/1.png does not open: the file is empty", "/a folder/1.png"),
        BadSample("2", "image file /images/z.png does not exist", "z.png"),
        BadSample("3", "image /a folder/3.png does not open: the file is empty", "/a folder/3.png"),
        BadSample("4", "2 more image(s) than <image> in its text"),
        BadSample("5", "11 more image(s) than <image> in its text"),
        BadSample("6", "12 more image(s) than <image> in its text"),
    ]
    assert group_reasons(problems) == [
        ("2 more image(s) than <image> in its text", 3),
        ("image … does not open: the file is empty", 2),
        ("image file /images/z.png does not exist", 1),
    ]
