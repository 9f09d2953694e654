"""Videos as frames, for models that know pictures: evenly spread over the file, decoded in one pass.

Reads files with PyAV, which the extra `video` installs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.sample import BadSample, Picture


def frames_of(path: Path, most: int, sample_id: str) -> tuple[Picture, ...]:
    """Up to `most` frames of a video, evenly spread: the middle of each of as many equal stretches.

    Raises:
        BadSample: it is no video.
    """
    number = num_frames(path, sample_id)
    kept = min(most, number)
    return tuple(Picture(path, frame=(2 * index + 1) * number // (2 * kept)) for index in range(kept))


def num_frames(path: Path, sample_id: str) -> int:
    """How many frames a video file holds: its packets are counted, not decoded, since headers may be wrong.

    Those before the start of a video that was cut without encoding it again are decoded, but not shown.

    Raises:
        BadSample: it is no video, or has no frame.
    """
    av = _av(path)
    with _opened(path, sample_id) as container:
        try:
            number = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(video=0))
        except av.FFmpegError as error:
            raise BadSample(sample_id, f"video {path} does not read on: {error}", str(path)) from error
    if not number:
        raise BadSample(sample_id, f"video {path} has no frame", str(path))
    return number


def read_frames(path: Path, frames: Sequence[int], sample_id: str) -> list[Image.Image]:
    """The frames of these numbers, in the order in which they are asked for.

    Raises:
        BadSample: the file does not decode as far as that.
    """
    av = _av(path)
    wanted, found = set(frames), {}
    with _opened(path, sample_id) as container:
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


def _av(path: Path) -> Any:
    """The library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path} is a video; reading one needs PyAV: pip install small-vlm[video]") from error
    return av


def _opened(path: Path, sample_id: str) -> Any:
    """An open container with a video stream."""
    av = _av(path)
    try:
        container = av.open(str(path), metadata_errors="replace")  # titles may be in any encoding
    except (av.FFmpegError, OSError) as error:
        raise BadSample(sample_id, f"video {path} does not open: {error}", str(path)) from error
    if not container.streams.video:
        raise BadSample(sample_id, f"{path} holds no video", str(path))
    return container
