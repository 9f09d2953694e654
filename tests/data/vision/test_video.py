"""Videos as frames: how many there are, which are taken, and files that are none."""

import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vlm.data.sample import BadSample, ImageRef, Sample, Turn, VideoRef
from vlm.data.vision import images as pictures
from vlm.data.vision import video
from vlm.data.vision.frames import sample_clip, sample_frame_refs
from vlm.data.vision.images import open_image, open_media
from vlm.data.vision.video import (
    DEMUXERS,
    make_timeline,
    num_frames,
    read_frames,
    spread_frames,
)

RATE = 10
STEP = 12
"""How much lighter a frame is than the one before."""


def write_video(path: Path, number: int, codec: str = "mpeg4", title: str = "grey") -> Path:
    """A video of grey frames, each lighter than the one before, with frames that depend on later ones."""
    with av.open(str(path), "w", metadata_encoding="latin-1") as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=RATE)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", {"bf": "2", "qmax": "2"}
        stream.bit_rate = 4_000_000
        for index in range(number):
            pixels = np.full((48, 64, 3), index * STEP, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(images: list[Image.Image]) -> list[int]:
    """Which frames these are, told by how light they are."""
    return [round(float(np.asarray(image).mean()) / STEP) for image in images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 20 frames, and `short.mp4` of three."""
    path = tmp_path_factory.mktemp("videos")
    for name in ("a.mp4", "a.avi", "a.mkv"):
        write_video(path / name, 20)
    write_video(path / "short.mp4", 3)
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
def test_frames_are_counted_and_read(folder: Path, name: str):
    assert num_frames(folder / name, "7") == 20
    assert numbers(read_frames(folder / name, list(range(20)), "7")) == list(range(20))
    assert read_frames(folder / name, [0], "7")[0].size == (64, 48)


SPREAD = {1: [10], 2: [5, 15], 3: [3, 10, 16], 4: [2, 7, 12, 17], 20: list(range(20)), 99: list(range(20))}


@pytest.mark.parametrize("most", SPREAD)
def test_frames_are_spread_evenly(folder: Path, most: int):
    found = sample_frame_refs(VideoRef(folder / "a.mp4"), most, "7")
    assert found == tuple(ImageRef(folder / "a.mp4", frame=frame) for frame in SPREAD[most])
    assert numbers(read_frames(folder / "a.mp4", SPREAD[most], "7")) == SPREAD[most]


def test_a_short_video_gives_all_that_it_has(folder: Path):
    assert [picture.frame for picture in sample_frame_refs(VideoRef(folder / "short.mp4"), 8, "7")] == [0, 1, 2]


def test_frames_come_in_the_order_in_which_they_are_asked_for(folder: Path):
    assert numbers(read_frames(folder / "a.mp4", [9, 2, 9, 0, 19], "7")) == [9, 2, 9, 0, 19]
    assert numbers([open_image(ImageRef(folder / "a.mp4", frame=4), "7")]) == [4]


def test_a_sample_opens_each_video_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def read(path: Path, frames: list[int], sample_id: str) -> list[Image.Image]:
        asked.append((path.name, frames))
        return read_frames(path, frames, sample_id)

    monkeypatch.setattr(pictures, "read_frames", read)
    Image.new("RGB", (8, 8), (4 * STEP,) * 3).save(folder / "p.png")
    turn = Turn("user", (VideoRef(folder / "a.mp4"), "?", ImageRef(folder / "p.png"), VideoRef(folder / "short.mp4")))
    sample = Sample("7", (turn,)).with_videos(lambda video: sample_frame_refs(video, 2, "7"))
    assert numbers(open_media(sample)) == [5, 15, 4, 0, 2]
    assert asked == [("a.mp4", [5, 15]), ("short.mp4", [0, 2])]


def test_frames_before_the_start_of_a_cut_video_do_not_count(folder: Path):
    """Cut without encoding it again: what stands before its start is there to decode what follows."""
    with av.open(str(folder / "a.mp4")) as whole, av.open(str(folder / "cut.mp4"), "w") as cut:
        source = whole.streams.video[0]
        target = cut.add_stream_from_template(source)
        assert source.time_base is not None
        shift = round(7 / RATE / source.time_base)
        for packet in whole.demux(source):
            if packet.size:
                assert packet.pts is not None
                assert packet.dts is not None
                packet.stream, packet.pts, packet.dts = target, packet.pts - shift, packet.dts - shift
                cut.mux(packet)
    assert num_frames(folder / "cut.mp4", "7") == 13
    frames = [picture.frame for picture in sample_frame_refs(VideoRef(folder / "cut.mp4"), 99, "7")]
    assert numbers(read_frames(folder / "cut.mp4", [frame for frame in frames if frame is not None], "7")) == [
        *range(7, 20)
    ]


VARIABLE = [*range(0, 1000, 100), *range(1000, 11000, 1000)]
"""Milliseconds: ten frames in the first second, then one a second."""


def write_timed_video(path: Path, milliseconds: Sequence[int], rate: int = 1000) -> Path:
    """A video of grey frames that are shown at these times; the file states another rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", {"qmax": "2"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), index * STEP % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_frames_of_a_variable_rate_are_spread_in_time_and_have_their_own_times(tmp_path: Path, name: str):
    path = write_timed_video(tmp_path / name, VARIABLE)
    clip = sample_clip(VideoRef(path), 8, "7")
    assert clip.times == tuple(VARIABLE[frame] / 1000 for frame in clip.frames)
    assert len(set(clip.frames)) == 8
    gaps = np.diff(clip.times or ())
    assert 0.4 <= gaps.min() <= gaps.max() <= 2.0
    assert tuple(ref.frame for ref in sample_frame_refs(VideoRef(path), 8, "7")) == clip.frames
    assert numbers(read_frames(path, clip.frames, "7")) == list(clip.frames)
    assert clip.total_frames / clip.fps == pytest.approx(10, abs=1)


@pytest.mark.parametrize("milliseconds", [range(0, 990, 33), [round(n * 1001 / 30) for n in range(40)]])
def test_a_constant_rate_is_that_of_the_stamps_whatever_the_file_states(tmp_path: Path, milliseconds: Sequence[int]):
    """As recorders write Matroska: a rate of 1000, and stamps that are rounded to milliseconds."""
    clip = sample_clip(VideoRef(write_timed_video(tmp_path / "a.mkv", milliseconds)), 4, "7")
    number = len(milliseconds)
    assert (clip.times, clip.frames) == (None, spread_frames(number, 4))
    assert clip.fps == pytest.approx(1000 * (number - 1) / milliseconds[-1])


TIMELINES: dict[str, tuple[list[float] | None, float, int, tuple[int, ...]]] = {
    "constant": ([0.0, 0.1, 0.2, 0.3], 10, 2, (1, 3)),
    "without stamps": (None, 10, 2, (1, 3)),
    "a late start": ([5.0, 5.1, 5.2, 5.3], 10, 2, (1, 3)),
    "a still at the end": ([0.0, 0.1, 0.2, 9.0], 10, 2, (2, 3)),
    "a still in the middle": ([0.0, 0.1, 8.9, 9.0], 10, 3, (1, 2, 3)),
    "as many as there are": ([0.0, 0.1, 0.2, 9.0], 10, 4, (0, 1, 2, 3)),
    "more than there are": ([0.0, 0.5, 9.0], 10, 4, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("kind", TIMELINES)
def test_a_frame_is_the_one_that_is_shown_in_the_middle_of_a_section(kind: str):
    stamps, fps, kept, frames = TIMELINES[kind]
    timeline = make_timeline(stamps, 4 if stamps is None else len(stamps), fps, 0.1)
    assert timeline.spread(kept) == frames


def test_a_title_may_be_in_any_encoding(tmp_path: Path):
    path = write_video(tmp_path / "a.avi", 3, title="gréy")
    assert "gréy".encode("latin-1") in path.read_bytes()
    assert num_frames(path, "7") == 3


def torn(folder: Path, name: str, share: float) -> bytes:
    whole = (folder / name).read_bytes()
    return whole[: int(len(whole) * share)]


BAD: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "torn.mp4": (lambda folder: torn(folder, "a.mp4", 0.9), "does not open"),
    "torn.avi": (lambda folder: torn(folder, "a.avi", 0.3), "does not open"),
    "empty.mp4": (lambda folder: b"", "does not open"),
    "page.mp4": (lambda folder: b"<html></html>", "does not open: it is text that begins with '<html></html>'"),
    "pointer.mp4": (lambda folder: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "missing.mp4": (lambda folder: b"", "No such file"),
    "sound.wav": (lambda folder: sound(), "it is sound (WAV)"),
}


def sound() -> bytes:
    """A tenth of a second of silence."""
    head = b"fmt " + (16).to_bytes(4, "little") + bytes.fromhex("0100010040 1f0000 803e0000 0200 1000")
    body = b"data" + (1600).to_bytes(4, "little") + bytes(1600)
    return b"RIFF" + (4 + len(head) + len(body)).to_bytes(4, "little") + b"WAVE" + head + body


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_whole_video_is_told_with_its_record(folder: Path, tmp_path: Path, name: str):
    content, said = BAD[name]
    if name != "missing.mp4":
        (tmp_path / name).write_bytes(content(folder))
    for read in (lambda path: sample_frame_refs(VideoRef(path), 4, "7"), lambda path: read_frames(path, [0], "7")):
        with pytest.raises(BadSample) as caught:
            read(tmp_path / name)
        assert said in caught.value.reason
        assert (caught.value.sample_id, caught.value.file) == ("7", str(tmp_path / name))


def test_a_video_that_ends_early_is_told(folder: Path):
    with pytest.raises(BadSample, match=r"record '7': video .*short.mp4 ends before frame 3"):
        read_frames(folder / "short.mp4", [1, 3, 5], "7")


def test_a_video_whose_frames_are_broken_is_told(folder: Path, tmp_path: Path):
    whole = bytearray((folder / "a.avi").read_bytes())
    start = whole.index(b"movi") + 12
    whole[start : start + 60] = bytes(60)
    (tmp_path / "a.avi").write_bytes(whole)
    with pytest.raises(BadSample, match=r"video .*a.avi (does not decode|ends before)"):
        read_frames(tmp_path / "a.avi", list(range(20)), "7")


def test_without_the_library_what_to_install_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    for read in (lambda: num_frames(tmp_path / "a.mp4", "7"), lambda: read_frames(tmp_path / "a.mp4", [0], "7")):
        with pytest.raises(
            ValueError, match=r"a.mp4 is a video; reading one needs PyAV: pip install small-vlm\[video\]"
        ):
            read()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nfile://{other}\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "ffconcat version 1.0\nfile 'link.mp4'\n"),
        ("concat:link.mp4|link.mp4", "x"),
        ("subfile,,start,0,end,0,,:link.mp4", "x"),
    ],
)
def test_a_video_leads_to_no_other_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
):
    """Neither a playlist nor a name that FFmpeg would take for an address."""
    other = write_video(tmp_path / "other.ts", 5)
    inner = tmp_path / "videos"
    inner.mkdir()
    (inner / "link.mp4").symlink_to(other)
    (inner / name).write_text(content.format(other=other))
    monkeypatch.chdir(inner)
    with pytest.raises(BadSample, match="does not open: it is text"):
        num_frames(Path(name), "x")


def test_the_kinds_of_videos_are_ffmpegs():
    known = {name for names in av.formats_available for name in names.split(",")}
    assert set(DEMUXERS) <= known


def test_a_video_of_huge_frames_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 100)
    with pytest.raises(BadSample, match=r"has frames of .* too large to decode"):
        read_frames(path, [0], "x")
