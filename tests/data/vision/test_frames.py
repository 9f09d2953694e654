"""Which frames are read of a video: by seconds, and of lists of frames as of the file that they were extracted from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.data.vision.test_video import write_timed_video
from vlm.data.encoding.labels import encode
from vlm.data.sample import BadSample, Clip, ImageRef, Sample, Turn, VideoRef
from vlm.data.sources import parts_for_video
from vlm.data.vision.frames import sample_clip, sample_frame_refs
from vlm.data.vision.images import media_sizes_from_opened, open_media, read_media_sizes
from vlm.data.vision.video import num_frames, probe_video, read_frames

STEADY = [100 * number for number in range(40)]
"""Milliseconds of the frames of a video of four seconds."""
UNEVEN = [0, 100, 200, 1500, 1600, 3900, 4000, 4100]


def extract(path: Path, folder: Path) -> tuple[ImageRef, ...]:
    """Every frame of a video as a PNG."""
    folder.mkdir()
    refs = []
    for number, frame in enumerate(read_frames(path, range(num_frames(path, "x")), "x")):
        frame.save(folder / f"{number}.png")
        refs.append(ImageRef(folder / f"{number}.png", is_extracted=True))
    return tuple(refs)


@pytest.mark.parametrize(
    ("fps", "most", "kept"), [(None, 8, 8), (1, 8, 4), (1, 3, 3), (0.1, 8, 1), (2, 99, 8), (50, 99, 40), (None, 99, 40)]
)
def test_frames_by_seconds(fps: float | None, most: int, kept: int, tmp_path: Path):
    video = VideoRef(write_timed_video(tmp_path / "a.mkv", STEADY))
    clip = sample_clip(video, most, "x", fps=fps)
    assert len(clip.frames) == kept
    assert [ref.frame for ref in sample_frame_refs(video, most, "x", fps=fps)] == list(clip.frames)
    gaps = [later - earlier for earlier, later in zip(clip.frames, clip.frames[1:], strict=False)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1, "evenly spaced"
    assert len(sample_clip(video, most, "x", fps=fps, min_frames=6).frames) == max(kept, 6)


@pytest.mark.parametrize("times", [STEADY, UNEVEN], ids=["steady", "uneven"])
@pytest.mark.parametrize(("fps", "most"), [(None, 4), (None, 99), (1, 99), (2, 5)])
def test_extracted_frames_are_the_video(times: list[int], fps: float | None, most: int, tmp_path: Path):
    path = write_timed_video(tmp_path / "a.mkv", times)
    timeline, _ = probe_video(path, "x")
    known = {"rate": timeline.fps} if timeline.times is None else {"times": timeline.times}
    whole, listed = VideoRef(path), VideoRef(path, frames=extract(path, tmp_path / "frames"), **known)
    clip = sample_clip(whole, most, "x", fps=fps)
    found = sample_clip(listed, most, "x", fps=fps)
    if times is UNEVEN:  # a list does not tell how long its last frame is shown
        assert found.fps == pytest.approx(clip.fps, rel=0.05)
        clip = replace(clip, fps=found.fps)
    assert found == clip
    refs = sample_frame_refs(listed, most, "x", fps=fps)
    assert [ref.path and ref.path.name for ref in refs] == [f"{frame}.png" for frame in clip.frames]
    opened = [
        open_media(Sample("x", (Turn("user", (VideoRef(path, clip, one.frames),)),)))[0] for one in (whole, listed)
    ]
    first, second = (video.frames for video in opened)  # type: ignore[union-attr]
    assert [frame.tobytes() for frame in first] == [frame.tobytes() for frame in second]


@pytest.mark.parametrize("tiled", [False, True])
def test_a_model_of_images_sees_extracted_frames_as_those_of_the_video(parts, tmp_path: Path, tiled: bool):
    path = write_timed_video(tmp_path / "a.mkv", STEADY)
    processor = parts.processor()
    if tiled:  # frames are then pooled, and images are not
        processor.anyres = {"grids": [[1, 2], [2, 1]], "tile_size": 24, "tokens_side": 3}
    listed = VideoRef(path, frames=extract(path, tmp_path / "frames"), rate=10.0)
    made = []
    for video in (VideoRef(path), listed):
        turns = (Turn("user", (*parts_for_video(video, 3, processor, "x"), "what?")), Turn("assistant", ("a",)))
        sample = Sample("x", turns)
        opened = open_media(sample)
        sizes = media_sizes_from_opened(sample.media, opened, processor)
        assert sizes == read_media_sizes(sample, processor) == ([None] * 3 if tiled else [])
        made.append((encode(processor, sample, sizes), processor.image_inputs(opened, sizes)))
    assert made[0][0] == made[1][0]
    assert made[0][1].keys() == made[1][1].keys()
    assert all(torch.equal(made[0][1][name], made[1][1][name]) for name in made[0][1])


def test_frames_of_another_size_are_resized_and_those_of_times_are_told(tmp_path: Path):
    for number, size in enumerate([(32, 16), (64, 48), (32, 16)]):
        Image.new("RGBA", size, (255, 0, 0, 0)).save(tmp_path / f"{number}.png")
    refs = tuple(ImageRef(tmp_path / f"{number}.png", is_extracted=True) for number in range(3))
    video = VideoRef(tmp_path / "0.png", frames=refs, times=(0.0, 1.0, 9.0))
    clip = sample_clip(video, 8, "x")
    assert clip == Clip((0, 1, 2), 3, 16, 32, clip.fps, (0.0, 1.0, 9.0))
    (opened,) = open_media(Sample("x", (Turn("user", (VideoRef(video.path, clip, refs, video.times),)),)))
    assert [(frame.size, frame.mode) for frame in opened.frames] == [((32, 16), "RGB")] * 3  # type: ignore[union-attr]
    assert opened.frames[0].getpixel((0, 0)) == (255, 255, 255)  # type: ignore[union-attr]
    single = VideoRef(tmp_path / "0.png", frames=refs[:1], times=(0.0,))
    assert sample_clip(single, 8, "x").frames == (0,)


def test_a_frame_that_does_not_open_is_named(tmp_path: Path):
    (tmp_path / "0.png").write_bytes(b"no image")
    video = VideoRef(tmp_path / "0.png", frames=(ImageRef(tmp_path / "0.png", is_extracted=True),), rate=2.0)
    with pytest.raises(BadSample, match=r"0\.png does not open"):
        sample_clip(video, 8, "x")
