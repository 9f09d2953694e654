"""Video files: when their frames are shown, and frames decoded in one pass.

Reads files with PyAV, which the extra `video` installs. A file that is no video or does not decode is a `BadSample`.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.file_kinds import describe_bytes, read_head
from vlm.data.sample import BadSample, Clip, VideoRef

DEFAULT_FPS = 24.0
"""Frames per second of a file that does not tell: what video processors assume then."""
DEMUXERS = (
    "mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "flv", "asf", "ogg", "gif", "ivf", "h264", "hevc", "obu",
    "m4v", "mxf", "nut", "rm",
)  # fmt: skip
"""Kinds of files that are read, as FFmpeg calls them; playlists and the like, which name other files, are none."""
OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": ",".join(DEMUXERS)}
MAX_FRAME_PIXELS = 1 << 26
"""The largest frame that is decoded: twice that of 8K; a file of a kilobyte may claim one of gigabytes."""


@dataclass(frozen=True)
class DecodedVideo:
    """The decoded frames of a clip."""

    frames: list[Image.Image]
    clip: Clip


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown.

    Attributes:
        total_frames: the number of frames.
        fps: frames per second, on average where the rate varies.
        times: seconds of each frame from the first one, ascending; None if the rate is constant.
        duration: seconds from the first frame to the end of the last one.
    """

    total_frames: int
    fps: float
    times: tuple[float, ...] | None
    duration: float

    def count_kept(self, max_frames: int, fps: float | None) -> int:
        """Return how many frames are kept, `max_frames` at most: with `fps`, so many for each second, at least one."""
        number = min(max_frames, self.total_frames)
        return number if fps is None else max(1, min(number, round(self.duration * fps)))

    def spread(self, num_kept: int) -> tuple[int, ...]:
        """Return the frame that is shown in the middle of each of `num_kept` equal sections of the time.

        Where a frame is shown in several sections, others near it take its place as long as there are enough, so that
        none is there twice.
        """
        if self.times is None:
            return spread_frames(self.total_frames, num_kept)
        middles = ((2 * section + 1) * self.duration / (2 * num_kept) for section in range(num_kept))
        shown = [bisect_right(self.times, middle) - 1 for middle in middles]
        if num_kept > self.total_frames:
            return tuple(shown)
        frames: list[int] = []
        for section, frame in enumerate(shown):
            first = frames[-1] + 1 if frames else 0
            frames.append(min(max(frame, first), self.total_frames - (num_kept - section)))
        return tuple(frames)


def make_timeline(stamps: Sequence[float] | None, number: int, fps: float, last_duration: float = 0.0) -> Timeline:
    """Return the timeline of a video of `number` frames.

    The rate is constant where every frame is shown within half a frame of its time at that rate: the one that the file
    states, or the one that the stamps have on average.

    Args:
        stamps: seconds of each frame, in any order; None if the file has none.
        number: of frames.
        fps: frames per second that the file states.
        last_duration: seconds that the last frame is shown; 0 if the file does not tell.
    """
    if stamps is None or number < 2:
        return Timeline(number, fps, None, number / fps)
    ordered = np.sort(np.asarray(stamps, dtype=np.float64))
    times = ordered - ordered[0]
    mean_rate = (number - 1) / times[-1] if times[-1] > 0 else fps
    for rate in (fps, float(mean_rate)):
        if np.abs(times - np.arange(number) / rate).max() <= 0.5 / rate:
            return Timeline(number, rate, None, number / rate)
    duration = float(times[-1]) + (last_duration or float(np.median(np.diff(times))))
    return Timeline(number, number / duration, tuple(times.tolist()), duration)


def spread_frames(number: int, num_kept: int) -> tuple[int, ...]:
    """Return the middle of each of `num_kept` equal sections of `number` frames."""
    return tuple((2 * index + 1) * number // (2 * num_kept) for index in range(num_kept))


def open_video(video: VideoRef, sample_id: str) -> DecodedVideo:
    """Decode the clip of a video; frames of another size than the file states are resized."""
    clip = video.clip
    assert clip is not None
    size = (clip.width, clip.height)
    frames = read_frames(video.path, clip.frames, sample_id)
    return DecodedVideo([frame if frame.size == size else frame.resize(size) for frame in frames], clip)


def num_frames(path: Path, sample_id: str) -> int:
    """Count the frames of a video file by its packets, since headers may be wrong, without decoding them.

    Packets before the start of a video that was cut without encoding it again are not counted.
    """
    return probe_video(path, sample_id)[0].total_frames


def probe_video(path: Path, sample_id: str) -> tuple[Timeline, tuple[int, int]]:
    """Return the times of a video's frames, from its packets, and their height and width."""
    with _open_container(path, sample_id, "read on") as container:
        stream = container.streams.video[0]
        size, fps = (stream.codec_context.height, stream.codec_context.width), float(stream.average_rate or DEFAULT_FPS)
        packets = [
            (packet.pts, packet.duration)
            for packet in container.demux(stream)
            if packet.size > 0 and not packet.is_discard
        ]
        unit = stream.time_base
    if not packets:
        raise BadSample(sample_id, f"video {path} has no frames", str(path))
    stamps = [stamp for stamp, _ in packets]
    if unit is None or None in stamps or len(set(stamps)) < len(stamps):  # no times, or not those of frames
        return make_timeline(None, len(packets), fps), size
    _, last_duration = max(packets, key=lambda packet: packet[0])
    seconds = [float(stamp * unit) for stamp in stamps]
    return make_timeline(seconds, len(packets), fps, float((last_duration or 0) * unit)), size


def read_frames(path: Path, frames: Sequence[int], sample_id: str) -> list[Image.Image]:
    """Decode the frames at these indices, in the order given."""
    wanted, images = set(frames), {}
    with _open_container(path, sample_id, "decode") as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                images[number] = frame.to_image()
            if len(images) == len(wanted):
                break
    if missing := sorted(wanted - images.keys()):
        raise BadSample(sample_id, f"video {path} ends before frame {missing[0]}", str(path))
    return [images[number] for number in frames]


@contextmanager
def _open_container(path: Path, sample_id: str, step: str) -> Iterator[Any]:  # PyAV declares no types of its streams
    """Open a file that has a video stream; if a later step fails with an error of PyAV, `step` names that step.

    Raises:
        ValueError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path} is a video; reading one needs PyAV: pip install small-vlm[video]") from error
    action = "open"
    try:
        # `file:`, since a name may look like an address; titles may be in any encoding.
        with av.open(f"file:{path}", options=OPEN_OPTIONS, metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadSample(sample_id, f"{path} contains no video", str(path))
            codec = container.streams.video[0].codec_context
            if codec.width * codec.height > MAX_FRAME_PIXELS:
                size = f"{codec.width} × {codec.height}"
                raise BadSample(
                    sample_id, f"video {path} has frames of {size} pixels, which are too large to decode", str(path)
                )
            codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # frames may be larger than the file states
            action = step
            yield container
    except (av.FFmpegError, OSError) as error:
        reason = _describe_error(error, path) if action == "open" else error
        raise BadSample(sample_id, f"video {path} does not {action}: {reason}", str(path)) from error


def _describe_error(error: Exception, path: Path) -> str:
    """Describe why a file does not open: what it is instead of a video, or what the library says."""
    kind = describe_bytes(read_head(path)) if path.is_file() else None
    return str(error) if kind is None or kind.startswith("a video") else f"it is {kind.removeprefix('it is ')}"
