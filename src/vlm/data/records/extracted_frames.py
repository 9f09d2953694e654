"""Videos given as lists of frames that were extracted beforehand, with the frames' times.

Imports siblings, `sample` and the standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlm.data.records.fields import is_empty
from vlm.data.sample import BadSample, Record

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Extensions of frames, as opposed to videos; a GIF is a video."""
DEFAULT_RATE = 2.0
"""Frames per second of a list that has neither `fps` nor `times`: Qwen's tools assume the same."""
RATE_KEYS = ("fps", "sample_fps")
TIME_KEYS = ("times", "timestamps")


@dataclass(frozen=True)
class FrameList:
    """The frames of a video, with their rate, or with the seconds of each frame since the first one."""

    frames: Sequence[object]
    times: tuple[float, ...] = ()
    rate: float | None = None


def is_frame(value: object) -> bool:
    """Return whether a value names an image file, not a video, or holds the bytes of one."""
    if isinstance(value, dict):
        return is_frame(value.get("path")) or (isinstance(value.get("bytes"), bytes) and value.get("path") is None)
    return isinstance(value, str) and value.lower().endswith(FRAME_SUFFIXES)


def group_frames(record: Record, value: object, sample_id: str) -> object:
    """Return the videos that a record lists, with a list of image files as a single one.

    `fps` and `times` of the record are those of its lists of frames; of several videos, `times` has a list for each.
    """
    videos = [value] if isinstance(value, list) and value and all(map(is_frame, value)) else value
    if not isinstance(videos, list):
        return videos
    places = [place for place, video in enumerate(videos) if isinstance(video, list)]
    if not places:
        return videos
    rate, times = _first(record, RATE_KEYS), _first(record, TIME_KEYS)
    each: list[object] = [times] * len(places)
    if isinstance(times, list) and times and all(isinstance(item, list) for item in times):
        each = times
    elif times is not None and len(places) > 1:
        each = []
    if len(each) != len(places):
        raise BadSample(sample_id, f"`times` must have a list for each of its {len(places)} lists of frames")
    mapped = dict(zip(places, each, strict=True))
    return [
        {"frames": video, "fps": rate, "times": mapped[place]} if place in mapped else video
        for place, video in enumerate(videos)
    ]


def with_item_times(item: Record, file: object, sample_id: str) -> object:
    """Return the frames that an item of a message names with the item's `fps` or `times`; anything else unchanged.

    Raises:
        BadSample: the item has such a key but no list of frames.
    """
    given = [key for key in (*RATE_KEYS, *TIME_KEYS) if not is_empty(item.get(key))]
    if isinstance(file, list):
        return {"frames": file, "fps": _first(item, RATE_KEYS), "times": _first(item, TIME_KEYS)}
    if given:
        reason = (
            "it is for lists of extracted frames; for a video file, dataset.fps and dataset.max_frames choose frames"
        )
        raise BadSample(sample_id, f"`messages[].content[].{given[0]}` is not read: {reason}")
    return file


def read_frame_list(value: object, sample_id: str) -> FrameList:
    """Read a list of frames, or a mapping of `frames` with `fps` or `times`.

    Raises:
        BadSample: there is none, or the times do not fit.
    """
    given = value if isinstance(value, dict) else {"frames": value}
    frames = given.get("frames")
    if not isinstance(frames, list) or not frames or isinstance(frames[0], list):
        raise BadSample(sample_id, f"the frames of a video must be a list of at least one image, got {frames!r:.60}")
    times, rate = _first(given, TIME_KEYS), _first(given, RATE_KEYS)
    if times is not None:
        return FrameList(frames, _read_times(times, len(frames), sample_id))
    rate = DEFAULT_RATE if rate is None else _as_number(rate)
    if rate is None or not 0 < rate < math.inf:
        value = _first(given, RATE_KEYS)
        raise BadSample(sample_id, f"`fps` of a list of frames must be a number above 0, got {value!r:.40}")
    return FrameList(frames, rate=rate)


def _read_times(times: object, number: int, sample_id: str) -> tuple[float, ...]:
    seconds = [_as_number(time) for time in times] if isinstance(times, list) else []
    known = [time for time in seconds if time is not None and math.isfinite(time)]
    if len(known) != number or len(seconds) != number:
        raise BadSample(sample_id, f"`times` must be {number} seconds, one for each frame, got {times!r:.60}")
    if any(later <= earlier for earlier, later in pairwise(known)):
        raise BadSample(sample_id, "`times` of the frames of a video must ascend")
    return tuple(time - known[0] for time in known)


def _as_number(value: object) -> float | None:
    """Return a number, or a text that is one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _first(values: Record, keys: Sequence[str]) -> object:
    return next((values[key] for key in keys if not is_empty(values.get(key))), None)
