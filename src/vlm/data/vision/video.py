"""Frames of videos, evenly spread over the file and decoded in one pass: as images, or as clips.

Reads files with PyAV, which the extra `video` installs. A file that is no video or does not decode is a `BadSample`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.sample import BadSample, Clip, ImageRef, VideoRef

DEFAULT_FPS = 24.0
"""Frames per second of a file that does not tell: what video processors assume then."""


@dataclass(frozen=True)
class DecodedVideo:
    """The decoded frames of a clip."""

    frames: list[Image.Image]
    clip: Clip


def sample_frame_refs(path: Path, max_frames: int, sample_id: str) -> tuple[ImageRef, ...]:
    """Choose up to `max_frames` frames of a video, evenly spread: the middle of each of as many equal sections."""
    number = num_frames(path, sample_id)
    return tuple(ImageRef(path, frame=frame) for frame in spread_frames(number, min(max_frames, number)))


def sample_clip(path: Path, max_frames: int, sample_id: str, *, min_frames: int = 1) -> Clip:
    """Choose at least `min_frames` and up to `max_frames` frames of a video, spread as in `sample_frame_refs`.

    None is decoded; frames of a video that has fewer than `min_frames` are repeated.
    """
    number, size, fps = _probe_video(path, sample_id)
    if not all(size):
        raise BadSample(sample_id, f"video {path} does not say how large its frames are", str(path))
    return Clip(spread_frames(number, max(min_frames, min(max_frames, number))), number, *size, fps)


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
    return _probe_video(path, sample_id)[0]


def _probe_video(path: Path, sample_id: str) -> tuple[int, tuple[int, int], float]:
    """Return the number of frames of a video file, their height and width, and the frames per second."""
    with _open_container(path, sample_id, "read on") as container:
        stream = container.streams.video[0]
        size, fps = (stream.codec_context.height, stream.codec_context.width), float(stream.average_rate or DEFAULT_FPS)
        number = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
    if not number:
        raise BadSample(sample_id, f"video {path} has no frame", str(path))
    return number, size, fps


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
    """Open a file that has a video stream; where a further step fails with an error of PyAV's, `step` names it.

    Raises:
        ValueError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path} is a video; reading one needs PyAV: pip install small-vlm[video]") from error
    action = "open"
    try:
        with av.open(str(path), metadata_errors="replace") as container:  # titles may be in any encoding
            if not container.streams.video:
                raise BadSample(sample_id, f"{path} holds no video", str(path))
            action = step
            yield container
    except (av.FFmpegError, OSError) as error:
        raise BadSample(sample_id, f"video {path} does not {action}: {error}", str(path)) from error
