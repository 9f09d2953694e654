"""Which frames are read of a video, evenly spread in time: of a video file, or of frames that were extracted before."""

from vlm.data.sample import BadSample, Clip, ImageRef, VideoRef
from vlm.data.vision.images import read_image_size
from vlm.data.vision.video import DEFAULT_FPS, Timeline, make_timeline, probe_video


def sample_frame_refs(
    video: VideoRef, max_frames: int, sample_id: str, *, fps: float | None = None
) -> tuple[ImageRef, ...]:
    """Choose up to `max_frames` frames of a video, evenly spread in time, see `Timeline.spread`.

    With `fps`, so many for each second of the video, and one at least.
    """
    timeline = make_frame_list_timeline(video) if video.frames else probe_video(video.path, sample_id)[0]
    frames = timeline.spread(timeline.count_kept(max_frames, fps))
    return tuple(video.frames[frame] if video.frames else ImageRef(video.path, frame=frame) for frame in frames)


def sample_clip(
    video: VideoRef, max_frames: int, sample_id: str, *, min_frames: int = 1, fps: float | None = None
) -> Clip:
    """Choose at least `min_frames` and up to `max_frames` frames of a video, spread as in `sample_frame_refs`.

    None is decoded; frames of a video that has fewer than `min_frames` are repeated. Of extracted frames, the size is
    that of the first one.
    """
    if video.frames:
        width, height = read_image_size(video.frames[0], sample_id)
        timeline, size = make_frame_list_timeline(video), (height, width)
    else:
        timeline, size = probe_video(video.path, sample_id)
    if not all(size):
        raise BadSample(sample_id, f"video {video.path} does not record the size of its frames", str(video.path))
    frames = timeline.spread(max(min_frames, timeline.count_kept(max_frames, fps)))
    times = None if timeline.times is None else tuple(timeline.times[frame] for frame in frames)
    return Clip(frames, timeline.total_frames, *size, timeline.fps, times)


def make_frame_list_timeline(video: VideoRef) -> Timeline:
    """Return when the frames of a list are shown: as those of a video file with the same times."""
    number = len(video.frames)
    if video.rate is not None:
        return Timeline(number, video.rate, None, number / video.rate)
    rate = (number - 1) / video.times[-1] if number > 1 else DEFAULT_FPS
    return make_timeline(video.times, number, rate)
