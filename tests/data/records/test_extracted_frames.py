"""Videos as lists of frames: which lists are one video, and when its frames are shown."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import picture
from vlm.data.records.conversations import read_messages
from vlm.data.records.extracted_frames import is_frame
from vlm.data.records.formats import FORMATS
from vlm.data.sample import BadSample, ImageRef, VideoRef


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "v.mp4").write_bytes(b"")
    return tmp_path


NAMES = ["0.png", "1.png", "2.png"]


def frames(folder: Path, *names: str) -> tuple[ImageRef, ...]:
    return tuple(ImageRef(folder / name, is_extracted=True) for name in names)


def asked(text: str = "<video>\nwhat?", **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}], **keys}


LISTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a list under video": ({"video": NAMES}, {"rate": 2.0}),
    "a list in videos": ({"videos": [NAMES]}, {"rate": 2.0}),
    "with a rate": ({"videos": [NAMES], "fps": 4}, {"rate": 4.0}),
    "with a rate as text": ({"video": NAMES, "fps": "0.5"}, {"rate": 0.5}),
    "with times": ({"video": NAMES, "times": [1, 2, 4.5]}, {"times": (0.0, 1.0, 3.5)}),
    "a mapping": ({"video": {"frames": NAMES, "fps": 3}}, {"rate": 3.0}),
    "a mapping with times": ({"videos": [{"frames": NAMES, "times": [0, 1, 5]}]}, {"times": (0.0, 1.0, 5.0)}),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_images_is_a_video(name: str, folder: Path):
    keys, times = LISTS[name]
    expected = VideoRef(folder / "0.png", frames=frames(folder, *NAMES), **times)
    assert read_messages(asked(**keys), folder).videos == [expected]
    llava = {"conversations": [{"from": "human", "value": "<video>a?"}, {"from": "gpt", "value": "b"}], **keys}
    assert FORMATS["llava"](llava, folder).videos == [expected]
    assert FORMATS["question"]({"question": "a?", "answer": "b", **keys}, folder).videos == [expected]
    assert FORMATS["alpaca"]({"instruction": "a?", "output": "b", **keys}, folder).videos == [expected]


def test_an_item_names_frames(folder: Path):
    item = {"type": "video", "video": NAMES, "sample_fps": "4.0"}
    record = {"messages": [{"role": "user", "content": [item]}, {"role": "assistant", "content": "a"}]}
    (video,) = read_messages(record, folder).videos
    assert (len(video.frames), video.rate) == (3, 4.0)


def test_videos_of_both_kinds(folder: Path):
    both = read_messages(
        asked("<video><video><video>", videos=["v.mp4", NAMES, ["3.png"]], times=[[0, 1, 2], [0]]), folder
    )
    assert [len(video.frames) for video in both.videos] == [0, 3, 1]
    assert both.videos[2].times == (0.0,)
    files = read_messages(asked("<video><video>", videos=["v.mp4", "v.mp4"], fps=30), folder)
    assert files.videos == [VideoRef(folder / "v.mp4")] * 2, "the rate of files is their own"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a missing frame": ({"video": ["0.png", "9.png"]}, "9.png does not exist"),
    "a frame outside": ({"video": ["0.png", "../a.png"]}, "a.png does not exist"),
    "no frame": ({"video": {"frames": []}}, "must be a list of at least one image"),
    "a rate of none": ({"video": NAMES, "fps": 0}, "`fps` of a list of frames must be a number above 0, got 0"),
    "no rate": ({"video": NAMES, "fps": "fast"}, "must be a number above 0, got 'fast'"),
    "too few times": ({"video": NAMES, "times": [0, 1]}, "`times` must be 3 seconds, one for each frame"),
    "times that do not ascend": ({"video": NAMES, "times": [0, 2, 2]}, "must ascend"),
    "times of one of two": ({"videos": [NAMES, NAMES], "times": [0, 1, 2]}, "a list for each of its 2 lists of frames"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, folder: Path):
    keys, said = BAD[name]
    with pytest.raises(BadSample) as caught:
        read_messages(asked("<video>" * len(keys.get("videos", [0])), **keys), folder)
    assert said in caught.value.reason


def test_a_rate_of_an_items_video_file_is_refused(folder: Path):
    item = {"type": "video", "video": "v.mp4", "fps": 2}
    record = {"messages": [{"role": "user", "content": [item]}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(BadSample, match=r"\.fps` is not read: it is for lists of extracted frames"):
        read_messages(record, folder)
    assert read_messages(record, folder, ignore_keys=["fps"]).videos == [VideoRef(folder / "v.mp4")]


def test_images_are_told_from_videos():
    assert is_frame("a.JPG")
    assert is_frame({"bytes": b"x", "path": None})
    assert not is_frame("a.gif")
    assert not is_frame("a.mp4")
    assert not is_frame(None)
