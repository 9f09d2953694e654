"""The one in-memory form of a record: a `Sample` of `Turn`s, whatever file it came from. Imports nothing of `vlm`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")
PLACEHOLDER = "<image>"
"""What stands for a picture in text that people write, whatever token the model has for it."""
VIDEO_PLACEHOLDER = "<video>"
"""What stands for a video in such text."""


@dataclass(frozen=True)
class Clip:
    """What is seen of a video, and when: all that a processor's tokens for it depend on.

    Attributes:
        frames: the numbers of the frames that are seen, from 0, in order.
        total: how many frames the video has.
        height: of each, in pixels.
        width: of each, in pixels.
        fps: frames of the video per second.
    """

    frames: tuple[int, ...]
    total_frames: int
    height: int
    width: int
    fps: float


MediaSize = tuple[int, int] | Clip | None
"""Height and width of a picture, or what is seen of a video; None for a frame that stands for one, where a processor
takes all frames alike."""


class BadSample(ValueError):
    """A record that cannot be used; the message says which, and why."""

    def __init__(self, sample_id: str, reason: str, file: str | None = None):
        super().__init__(f"record {sample_id!r}: {reason}")
        self.sample_id = sample_id
        self.reason = reason
        self.file = file

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str | None]]:
        """Pickled with what it was made of, so that it comes out of a data worker whole."""
        return type(self), (self.sample_id, self.reason, self.file)


class OverLong(BadSample):
    """A record that has more tokens than a sample may have."""


@dataclass(frozen=True)
class ImageRef:
    """A picture in a turn: an image file, the bytes of one, or a frame of a video file.

    Attributes:
        path: the file; with `content`, only its name, and None where it has none.
        content: the bytes of the image file, where the record itself holds them.
        frame: the number of the frame, from 0, where `path` is a video.
    """

    path: Path | None = None
    content: bytes | None = field(default=None, repr=False)
    frame: int | None = None

    def __str__(self) -> str:
        name = "in the record itself" if self.path is None else str(self.path)
        return name if self.frame is None else f"{name}, frame {self.frame}"


@dataclass(frozen=True)
class VideoRef:
    """A video file in a turn. A model that knows pictures only gets some of its frames, see `data.video`.

    Attributes:
        path: the file.
        clip: what is seen of it, once that is settled.
    """

    path: Path
    clip: Clip | None = None


ContentPart = str | ImageRef | VideoRef


@dataclass(frozen=True)
class Turn:
    """What one side says: texts, pictures and videos in the order in which they stand."""

    role: str
    content: tuple[ContentPart, ...]

    def as_message(self, image_token: str, video_token: str | None = None) -> dict[str, str]:
        """The turn as chat templates read it, a token for each picture and video."""
        tokens = {ImageRef: image_token, VideoRef: video_token or image_token}
        parts = [part if isinstance(part, str) else tokens[type(part)] for part in self.content]
        return {"role": self.role, "content": "".join(parts)}


@dataclass(frozen=True)
class Sample:
    """A conversation with its pictures.

    Attributes:
        id: what the record calls itself.
        turns: what is said, in order.
        label: what a prediction head learns of it: a value that JSON can hold, or a mapping from the names of heads to
            such; None where there is nothing to learn.
        group: the rows that a ranking compares have the same.
        references: what an answer in place of the last reply is held against, where that is more than the reply.
    """

    id: str
    turns: tuple[Turn, ...]
    label: Any = None
    group: str | None = None
    references: tuple[str, ...] = ()

    @property
    def images(self) -> list[ImageRef]:
        """All pictures, in the order in which they stand in the text."""
        return [part for turn in self.turns for part in turn.content if isinstance(part, ImageRef)]

    @property
    def videos(self) -> list[VideoRef]:
        """All videos, in the order in which they stand in the text."""
        return [part for turn in self.turns for part in turn.content if isinstance(part, VideoRef)]

    @property
    def media(self) -> list[ImageRef | VideoRef]:
        """All pictures and videos, in the order in which they stand in the text."""
        return [part for turn in self.turns for part in turn.content if not isinstance(part, str)]

    def with_videos(self, replace_video: Callable[[VideoRef], tuple[ContentPart, ...]]) -> "Sample":
        """The sample with other parts in place of each video."""
        if not self.videos:
            return self
        turns = [
            replace(turn, content=tuple(
                new for part in turn.content for new in (replace_video(part) if isinstance(part, VideoRef) else (part,))
            ))
            for turn in self.turns
        ]  # fmt: skip
        return replace(self, turns=tuple(turns))
