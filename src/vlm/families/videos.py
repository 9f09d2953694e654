"""Videos for a family's own processor: frames that are chosen beforehand, with their times.

Every token and every pixel is the family's own. To count tokens, its processor gets blank frames, once for each shape.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from vlm.data.sample import Clip
from vlm.data.vision.video import DEFAULT_FPS, DecodedVideo
from vlm.families.native import call_options
from vlm.families.token_spans import encode_with_spans

CLOCK = 1000
"""Frames per second of the video that stands for one of a variable rate: its times are told to the millisecond."""
METADATA = "video_metadata"
"""The output of a processor that is no input of its model: frames and times, of which some make their text."""
BLANK_SIDE = 64
"""The height and width of a small video, in pixels."""
MAX_KEPT_VALUES = 1000
"""Of larger tensors only the shape is kept: they are no grids of patches, nor else needed for a number of tokens."""


class FamilyVideos:
    """The part of a family's processor that reads videos.

    Args:
        native: transformers' processor of the family.
        min_frames: the fewest frames of a video.
        equal_num_frames: whether all videos of a batch must have the same number of frames.
        text: what stands for a video by itself; None: its token.
    """

    def __init__(self, native: Any, min_frames: int, *, equal_num_frames: bool = False, text: str | None = None):
        self.needs_call = False
        """Whether the text of a video is known by a whole call alone: its replacement takes options of such a call."""
        self.native, self.fewest, self.equal_num_frames = native, min_frames, equal_num_frames
        self.token: str = native.video_token
        self.text = text or self.token
        self.expansion = lru_cache(4096)(self._compute_expansion)
        self._blank_outputs = lru_cache(256)(self._read_blank)

    @property
    def minimal_clip(self) -> Clip:
        """The shortest clip that the model reads."""
        return make_blank_clip(self.fewest)

    def min_frames(self, max_frames: int) -> int:
        """Return how many frames are read of even the shortest video, where at most `max_frames` are read of any."""
        return max_frames if self.equal_num_frames else self.fewest

    def inputs(self, *videos: DecodedVideo, apart: bool = False) -> Mapping[str, Any]:
        """Return all outputs of the processor for the videos of a text: inputs of the model, and those of its text.

        With `apart`, each video has a text of its own.
        """
        frames = [torch.from_numpy(np.stack([np.asarray(frame) for frame in video.frames])) for video in videos]
        outputs = self.native(
            text=[self.token] * len(videos) if apart else [self.token * len(videos)],
            videos=[video.permute(0, 3, 1, 2).contiguous() for video in frames],  # (frames, 3, height, width)
            video_metadata=[make_metadata(video.clip) for video in videos],
            do_sample_frames=False,
            return_metadata=True,
            return_tensors="pt",
            return_text_replacement_offsets=True,
            **call_options(self.native),
        )
        return {name: value for name, value in outputs.items() if name != METADATA}

    def checked_blank_inputs(self, frames: int) -> Mapping[str, object]:
        """Return all outputs of the processor for a small blank video, whose ids are compared with those made here.

        Raises:
            ValueError: the processor's ids are others.
        """
        clip = make_blank_clip(frames)
        outputs = self.inputs(make_blank_video(clip))
        ids = torch.as_tensor(outputs["input_ids"])[0].tolist()
        expansion = self.expansion(clip)
        tokenizer = self.native.tokenizer
        own = [encode_with_spans(tokenizer, expansion, add_special_tokens=adds)[0] for adds in (True, False)]
        if ids not in (*own, [tokenizer.bos_token_id, *own[1]]):
            raise ValueError(f"{type(self.native).__name__} writes other tokens for a video than its call of one has")
        return outputs

    def forget_sizes(self) -> None:
        """Count the tokens of each shape of a video anew, since the video processor is another one."""
        self.expansion.cache_clear()
        self._blank_outputs.cache_clear()

    def _compute_expansion(self, clip: Clip) -> str:
        """Return the text that a video token is replaced by."""
        if not self.needs_call:
            outputs = {**self._blank_outputs(len(clip.frames), clip.height, clip.width)}
            outputs["video_metadata"] = [make_metadata(clip)]
            try:
                return str(self.native.replace_video_token(outputs, video_idx=0))
            except KeyError:  # an option that a call of the processor passes on
                self.needs_call = True
        replacements = self.inputs(make_blank_video(clip))["text_replacement_offsets"]
        return str(replacements[0][0]["replacement"])

    def _read_blank(self, frames: int, height: int, width: int) -> Mapping[str, object]:
        """Return the outputs of the video processor for blank frames; large ones keep their shapes only."""
        return self._read(torch.zeros(1, dtype=torch.uint8).expand(frames, 3, height, width))

    def _read(self, frames: Tensor) -> Mapping[str, object]:
        """Return the outputs of the video processor for `(frames, 3, height, width)`, as `_read_blank`."""
        outputs = self.native.video_processor(
            [frames],
            video_metadata=[make_metadata(_plain_clip(frames))],
            do_sample_frames=False,
            return_metadata=True,
            return_tensors="pt",
        )
        return {name: _without_memory(value) for name, value in outputs.items()}

    def expand_blank(self, frames: Tensor) -> str:
        """Return the text that a video token is replaced by for frames `(frames, 3, height, width)`.

        They may be on the meta device, where the video processor reads no pixel to decide on their size.
        """
        metadata = [make_metadata(_plain_clip(frames))]
        return str(self.native.replace_video_token({**self._read(frames), "video_metadata": metadata}, video_idx=0))


def _plain_clip(frames: Tensor) -> Clip:
    """Return a clip of all frames of a video, `(frames, 3, height, width)`, one a second."""
    number, _, height, width = frames.shape
    return Clip(tuple(range(number)), number, height, width, 1.0)


def make_blank_clip(frames: int) -> Clip:
    """Return what stands for a small video of some frames."""
    return Clip(tuple(range(frames)), frames, BLANK_SIDE, BLANK_SIDE, DEFAULT_FPS)


def make_blank_video(clip: Clip) -> DecodedVideo:
    """Return a clip with black frames."""
    return DecodedVideo([Image.new("RGB", (clip.width, clip.height))] * len(clip.frames), clip)


def make_metadata(clip: Clip) -> VideoMetadata:
    """Make the metadata of a clip for transformers; a new object each time, since processors write into it.

    Transformers takes the index of a frame over the frames per second for its time. Where the rate varies, indices and
    rate are therefore those of a video of `CLOCK` frames per second that shows the same frames at the same times.
    """
    fps, frames, total = clip.fps, list(clip.frames), clip.total_frames
    if clip.times is not None:
        frames, total, fps = [round(time * CLOCK) for time in clip.times], round(total / fps * CLOCK), float(CLOCK)
    return VideoMetadata(
        total_num_frames=total,
        fps=fps,
        width=clip.width,
        height=clip.height,
        duration=total / fps,
        frames_indices=frames,
    )


def joined(parts: Sequence[Mapping[str, Tensor]], rows: Sequence[str], dims: Mapping[str, int]) -> dict[str, Tensor]:
    """Concatenate the inputs of several images and videos of one sample.

    Those named in `rows` have one row for the sample, `(1, images, …)`; the others are `(images, …)`, or are
    concatenated along the dimension in `dims`.
    """
    collected: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            collected.setdefault(name, []).append(value)
    return {name: torch.cat(values, dim=dims.get(name, int(name in rows))) for name, values in collected.items()}


def _without_memory(value: object) -> object:
    """Return a large tensor without its memory; any other value unchanged."""
    if isinstance(value, Tensor) and value.numel() > MAX_KEPT_VALUES:
        return value.new_zeros(1).expand(value.shape)
    return value
