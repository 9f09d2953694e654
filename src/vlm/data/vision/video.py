"""Frames of videos, evenly spread over the file and decoded in one pass: as pictures, or as what is seen of a video.

Reads files with PyAV, which the extra `video` installs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.sample import BadSample, Clip, ImageRef, VideoRef

DEFAULT_FPS = 24.0
"""Frames per second of a file that does not say: what processors of videos take then."""


@dataclass(frozen=True)
class DecodedVideo:
    """The frames that are seen of a video, decoded, and what else is known of them."""

    frames: list[Image.Image]
    clip: Clip


def sample_frame_refs(path: Path, max_frames: int, sample_id: str) -> tuple[ImageRef, ...]:
    """Up to `most` frames of a video, evenly spread: the middle of each of as many equal stretches.

    Raises:
        BadSample: it is no video.
    """
    number = num_frames(path, sample_id)
    return tuple(ImageRef(path, frame=frame) for frame in spread_frames(number, min(max_frames, number)))


def sample_clip(path: Path, max_frames: int, sample_id: str, *, min_frames: int = 1) -> Clip:
    """What is seen of a video: up to `max_frames` frames, spread as those of `sample_frame_refs`. Nothing is decoded.

    Args:
        path: the file.
        max_frames: how many frames at most.
        sample_id: the record's.
        min_frames: how many at least; those of a shorter video are seen more than once.

    Raises:
        BadSample: it is no video.
    """
    number, size, fps = _probe_video(path, sample_id)
    if not all(size):
        raise BadSample(sample_id, f"video {path} does not say how large its frames are", str(path))
    return Clip(spread_frames(number, max(min_frames, min(max_frames, number))), number, *size, fps)


def spread_frames(number: int, num_kept: int) -> tuple[int, ...]:
    """The middle of each of `kept` equal stretches of so many frames."""
    return tuple((2 * index + 1) * number // (2 * num_kept) for index in range(num_kept))


def open_video(video: VideoRef, sample_id: str) -> DecodedVideo:
    """What is seen of a video, decoded; a frame of another size than the file says is made as large as the others.

    Raises:
        BadSample: the file does not decode.
    """
    clip = video.clip
    assert clip is not None
    size = (clip.width, clip.height)
    frames = read_frames(video.path, clip.frames, sample_id)
    return DecodedVideo([frame if frame.size == size else frame.resize(size) for frame in frames], clip)


def num_frames(path: Path, sample_id: str) -> int:
    """How many frames a video file holds: its packets are counted, not decoded, since headers may be wrong.

    Those before the start of a video that was cut without encoding it again are decoded, but not shown.

    Raises:
        BadSample: it is no video, or has no frame.
    """
    return _probe_video(path, sample_id)[0]


def _probe_video(path: Path, sample_id: str) -> tuple[int, tuple[int, int], float]:
    """How many frames a video file holds, their height and width, and how many there are per second."""
    av = _import_av(path)
    with _open_container(path, sample_id) as container:
        stream = container.streams.video[0]
        size, fps = (stream.codec_context.height, stream.codec_context.width), float(stream.average_rate or DEFAULT_FPS)
        try:
            number = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        except av.FFmpegError as error:
            raise BadSample(sample_id, f"video {path} does not read on: {error}", str(path)) from error
    if not number:
        raise BadSample(sample_id, f"video {path} has no frame", str(path))
    return number, size, fps


def read_frames(path: Path, frames: Sequence[int], sample_id: str) -> list[Image.Image]:
    """The frames of these numbers, in the order in which they are asked for.

    Raises:
        BadSample: the file does not decode as far as that.
    """
    av = _import_av(path)
    wanted, found = set(frames), {}
    with _open_container(path, sample_id) as container:
        try:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found[number] = frame.to_image()
                if len(found) == len(wanted):
                    break
        except av.FFmpegError as error:
            raise BadSample(sample_id, f"video {path} does not decode: {error}", str(path)) from error
    if missing := sorted(wanted - found.keys()):
        raise BadSample(sample_id, f"video {path} ends before frame {missing[0]}", str(path))
    return [found[number] for number in frames]


def _import_av(path: Path) -> Any:
    """The library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path} is a video; reading one needs PyAV: pip install small-vlm[video]") from error
    return av


def _open_container(path: Path, sample_id: str) -> Any:
    """An open container with a video stream."""
    av = _import_av(path)
    try:
        container = av.open(str(path), metadata_errors="replace")  # titles may be in any encoding
    except (av.FFmpegError, OSError) as error:
        raise BadSample(sample_id, f"video {path} does not open: {error}", str(path)) from error
    if not container.streams.video:
        raise BadSample(sample_id, f"{path} holds no video", str(path))
    return container
