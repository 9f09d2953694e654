"""Where images and videos are: paths within the folder, addresses that hold them, bytes; all else is refused."""

import base64
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.data.records.media import MediaPlacer, image_ref_from_value, image_refs_from_value, resolve_media_file
from vlm.data.sample import BadSample, ImageRef, OverLong, VideoRef

CONTENT = b"\x89PNG and so on"
ADDRESS = f"data:image/png;base64,{base64.b64encode(CONTENT).decode()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with `a.png` and `deep/b.png`; `outside.png` stands beside it."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png", "../outside.png"):
        (images / name).write_bytes(CONTENT)
    return images


GIVEN: dict[str, tuple[Any, list[Any]]] = {
    "nothing": (None, []),
    "an empty list": ([], []),
    "a path": ("a.png", ["a.png"]),
    "paths": (["deep/b.png", "a.png"], ["deep/b.png", "a.png"]),
    "a path by way of another folder": ("deep/../a.png", ["deep/../a.png"]),
    "a path of a table": ({"bytes": None, "path": "a.png"}, ["a.png"]),
    "bytes": ({"bytes": CONTENT, "path": None}, [None]),
    "an address": (ADDRESS, [None]),
    "all kinds": ([ADDRESS, "a.png", {"bytes": CONTENT}], [None, "a.png", None]),
}


@pytest.mark.parametrize("name", GIVEN)
def test_images_are_named_in_several_ways(folder: Path, name: str):
    value, names = GIVEN[name]
    found = [ImageRef(None, CONTENT) if path is None else ImageRef(folder / path) for path in names]
    assert image_refs_from_value(value, folder, "7") == found


def test_bytes_keep_the_name_that_they_had(folder: Path):
    """Only as a name: there need be no such file."""
    assert image_ref_from_value({"bytes": CONTENT, "path": "gone.png"}, folder, "7") == ImageRef(
        Path("gone.png"), CONTENT
    )


def videos_of(value: Any, folder: Path) -> tuple[Any, ...]:
    """The videos of a record that has no images."""
    return MediaPlacer({"video": value}, folder, "7").rest()


def test_videos_are_named_by_paths(folder: Path):
    for name in ("a.mp4", "deep/b.mp4"):
        (folder / name).write_bytes(b"")
    assert videos_of(["a.mp4", {"path": "deep/b.mp4"}], folder) == (
        VideoRef(folder / "a.mp4"), VideoRef(folder / "deep/b.mp4"),
    )  # fmt: skip
    assert videos_of(None, folder) == ()


BAD: dict[str, tuple[Any, str]] = {
    "a number": (3, "`photo` must be a path or a list of paths, got 3"),
    "torn base64 without an address": ("iVBORw0KGgo" * 30 + "!", "an image in base64 cannot be decoded"),
    "a number in a list": (
        ["a.png", 3],
        "`photo` must be a path, a list of paths, or hold the bytes of an image, got 3",
    ),
    "a list in a list": ([["a.png"]], "or hold the bytes of an image, got ['a.png']"),
    "None in a list": ([None], "or hold the bytes of an image, got None"),
    "an empty mapping": ({"bytes": None, "path": None}, "or hold the bytes of an image, got None"),
    "another encoding": ("data:image/png,abc", "an image in a data: address cannot be decoded: only base64 is read"),
    "no base64": ("data:image/png;base64,a#c=", "an image in a data: address cannot be decoded: "),
    "torn base64": (ADDRESS[:-1], "an image in a data: address cannot be decoded: "),
    "letters beyond ASCII": ("data:image/png;base64,äöü=", "an image in a data: address cannot be decoded: "),
    "a text, percent-encoded": (
        "data:text/plain,YQ",
        "an image in a data: address cannot be decoded: only base64 is read",
    ),
    "missing": ("z.png", "z.png does not exist"),
    "nothing": ("", "images does not exist"),
    "a folder": ("deep", "deep does not exist"),
    "upwards": ("../outside.png", "../outside.png leaves the image folder"),
    "upwards by way of a folder": ("deep/../../outside.png", "leaves the image folder"),
    "an address": ("https://example.com/a.png", "addresses are not fetched in training; download the image first"),
    "base64 alone": (ADDRESS.partition(",")[2] * 300, "does not exist"),
    "half a surrogate pair": ("\ud83d.png", "does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused_with_the_record_and_the_reason(folder: Path, name: str):
    value, said = BAD[name]
    with pytest.raises(BadSample) as caught:
        image_refs_from_value(value, folder, "7", "photo")
    assert said in caught.value.reason
    assert caught.value.sample_id == "7"


BAD_VIDEOS: dict[str, tuple[Any, str]] = {
    "a number": ([3], "`video` must be a path or a list of paths, got 3"),
    "bytes": ({"bytes": CONTENT}, "`video` must be a path or a list of paths, got None"),
    "missing": ("v.mp4", "video file "),
    "upwards": ("../outside.png", "leaves the image folder"),
    "an address": ("https://example.com/v.mp4", "addresses are not fetched"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_what_is_no_video_is_refused(folder: Path, name: str):
    value, said = BAD_VIDEOS[name]
    with pytest.raises(BadSample) as caught:
        videos_of(value, folder)
    assert said in caught.value.reason


@pytest.mark.parametrize("whole", [lambda path: path, lambda path: str(path) + "/../images"])
def test_a_folder_may_be_written_in_any_way(folder: Path, whole: Callable[[Path], str]):
    given = Path(whole(folder))
    assert resolve_media_file("a.png", given, "7") == given / "a.png"
    with pytest.raises(BadSample, match="leaves the image folder"):
        resolve_media_file("../outside.png", given, "7")


def test_a_folder_whose_name_begins_alike_is_another(folder: Path):
    (folder.parent / "images2").mkdir()
    (folder.parent / "images2" / "a.png").write_bytes(CONTENT)
    with pytest.raises(BadSample, match="leaves the image folder"):
        resolve_media_file("../images2/a.png", folder, "7")


def test_a_relative_folder_is_one_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert resolve_media_file("a.png", Path(), "7") == Path("a.png")
    with pytest.raises(BadSample, match="leaves the image folder"):
        resolve_media_file("../outside.png", Path(), "7")
    monkeypatch.chdir(folder / "deep")
    assert resolve_media_file("a.png", Path(".."), "7") == Path("../a.png")
    with pytest.raises(BadSample, match="leaves the image folder"):
        resolve_media_file("../outside.png", Path(".."), "7")


# What an image and an error say of themselves


def test_an_image_names_itself_without_its_bytes():
    assert str(ImageRef(None, CONTENT)) == "in the record itself"
    assert str(ImageRef(Path("v.mp4"), frame=3)) == "v.mp4, frame 3"
    assert "PNG" not in repr(ImageRef(Path("a.png"), CONTENT))


@pytest.mark.parametrize("kind", [BadSample, OverLong])
def test_an_error_comes_whole_out_of_a_worker(kind: type[BadSample]):
    error = pickle.loads(pickle.dumps(kind("7", "too odd", "a.png")))
    assert type(error) is kind
    assert (error.sample_id, error.reason, error.file) == ("7", "too odd", "a.png")
    assert str(error) == "record '7': too odd"
