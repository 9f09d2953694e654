"""The one in-memory form of a record: a `Sample` of `Turn`s, whatever file it came from.

Texts that no encoding can write are refused here, where records and prompts alike come in. Imports `vlm.config.shown`
and its siblings `objects` and `surrogates`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from vlm.config.shown import shorten
from vlm.data.objects import MarkedObject
from vlm.data.surrogates import HALF_PAIR, escape_surrogates, find_surrogate, has_surrogate

Record = dict[str, Any]
"""A record as its file holds it: values of JSON, and bytes of images."""

ROLES = ("system", "user", "assistant", "tool")
PLACEHOLDER = "<image>"
"""The text that stands for an image in records, whatever token the model has for images."""
VIDEO_PLACEHOLDER = "<video>"
"""The text that stands for a video in records."""


@dataclass(frozen=True)
class Clip:
    """The frames that are read of a video, and their times: all that the number of its tokens depends on.

    Attributes:
        frames: the indices of the frames that are read, from 0, in order.
        total_frames: the number of frames of the video.
        height: of each frame, in pixels.
        width: of each frame, in pixels.
        fps: frames of the video per second, on average where their times are known.
        times: seconds of each frame that is read, from the first frame of the video; None if the rate is constant,
            so that frame `n` is shown at `n / fps`.
    """

    frames: tuple[int, ...]
    total_frames: int
    height: int
    width: int
    fps: float
    times: tuple[float, ...] | None = None


MediaSize = tuple[int, int] | Clip | None
"""Height and width of an image, or the clip that is read of a video; None for a frame of a video, where the processor
encodes all frames alike."""

MEMORY_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")
"""The end of the text that Python shows for an object."""


class BadSample(ValueError):
    """A record that cannot be used; the message tells which record, and why.

    Args:
        sample_id: the name of the record.
        reason: what is wrong.
        file: the file at fault, if it is one.
    """

    def __init__(self, sample_id: str, reason: str, file: str | None = None):
        reason = MEMORY_ADDRESS.sub(">", reason)  # of an object in a library's message: another one in every run
        self.reason = shorten(escape_surrogates(reason))
        super().__init__(shorten(f"record {sample_id!r}: {self.reason}"))
        self.sample_id = escape_surrogates(sample_id)  # files of these are UTF-8
        self.file = None if file is None else shorten(escape_surrogates(file))

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str | None]]:
        """Pickle the arguments, so that the error comes out of a data worker whole."""
        return type(self), (self.sample_id, self.reason, self.file)


class OptionNeeded(BadSample):
    """A record that an option of its reader, `name=value`, would read."""

    def __init__(self, sample_id: str, reason: str, name: str, value: str):
        super().__init__(sample_id, reason)
        self.option = name, value

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, str | None]]:
        """Pickle it as a plain `BadSample`."""
        return BadSample, (self.sample_id, self.reason, self.file)


class KeyNeeded(BadSample):
    """A record without a value that its reader needs, and whose key the option `option` of the reader names."""

    def __init__(self, sample_id: str, reason: str, option: str):
        super().__init__(sample_id, reason)
        self.option = option

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, str | None]]:
        """Pickle it as a plain `BadSample`."""
        return BadSample, (self.sample_id, self.reason, self.file)


class Reasoned(Protocol):
    """Anything that has a reason, and the file at fault or None."""

    @property
    def reason(self) -> str:
        """What is wrong."""
        ...

    @property
    def file(self) -> str | None:
        """The file at fault."""
        ...


def group_reasons(problems: Iterable[Reasoned]) -> list[tuple[str, int]]:
    """Count problems by reason, the commonest first; return pairs of the reason and the number.

    Reasons that differ in the file and in numbers only are one; the first of them stands for all, without its file
    where that is not the same for all.
    """
    counts: Counter[str] = Counter()
    whole: dict[str, set[str]] = {}
    without_file: dict[str, str] = {}
    for problem in problems:
        file = problem.file
        reason = re.sub(rf"\S*{re.escape(file)}", "…", problem.reason) if file else problem.reason
        key = re.sub(r"\d+", "0", reason)
        counts[key] += 1
        without_file.setdefault(key, reason)
        if len(seen := whole.setdefault(key, set())) < 2:
            seen.add(problem.reason)
    return [
        (next(iter(whole[key])) if len(whole[key]) == 1 else without_file[key], number)
        for key, number in counts.most_common()
    ]


class OverLong(BadSample):
    """A record that has more tokens than allowed."""


@dataclass(frozen=True)
class ImageRef:
    """An image in a turn: an image file, the bytes of one, or a frame of a video file.

    Attributes:
        path: the file; with `content`, only the name of the image, or None.
        content: the bytes of the image file, where the record itself holds them.
        frame: the index of the frame, from 0, where `path` is a video.
        is_extracted: whether it is a frame of a video that was extracted before, `path` its image file.
    """

    path: Path | None = None
    content: bytes | None = field(default=None, repr=False)
    frame: int | None = None
    is_extracted: bool = False

    def __str__(self) -> str:
        """Return the path, and the number of the frame if it is one."""
        name = "in the record itself" if self.path is None else str(self.path)
        return name if self.frame is None else f"{name}, frame {self.frame}"


@dataclass(frozen=True)
class VideoRef:
    """A video in a turn; a model without video input gets some of its frames as images, see `vision.video`.

    Attributes:
        path: the file, or the first of the frames that were extracted.
        clip: the frames that are read of it, once they are chosen.
        frames: the frames, where they were extracted before; `path` is then no video.
        times: seconds of each of these from the first one, where `rate` is None.
        rate: how many of these there are for each second.
    """

    path: Path
    clip: Clip | None = None
    frames: tuple[ImageRef, ...] = ()
    times: tuple[float, ...] = ()
    rate: float | None = None


Picture, Video = ImageRef, VideoRef
"""Former names, for readers of records that people have written."""

ContentPart = str | ImageRef | VideoRef


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`; `tool` is the result of a call.
        content: texts, images and videos in order.
        supervised: whether a reply is trained on; one that is not is only read. Without meaning for other roles.
        weight: how much the loss of each token of a reply counts, above 0; without meaning if it is not learned.
        thinking: what the assistant thinks before its reply, where the record has it apart from the reply's text.
    """

    role: str
    content: tuple[ContentPart, ...]
    supervised: bool = True
    weight: float = 1.0
    thinking: str | None = None

    @property
    def is_blank(self) -> bool:
        """Whether it is a reply with nothing but blanks."""
        if self.role != "assistant" or self.thinking:
            return False
        return not any(isinstance(part, str) and part and not part.isspace() for part in self.content)

    def as_message(self, image_token: str, video_token: str | None = None) -> Record:
        """Return the turn as chat templates read it, with a token for each image and video."""
        tokens = {ImageRef: image_token, VideoRef: video_token or image_token}
        parts = [part if isinstance(part, str) else tokens[type(part)] for part in self.content]
        thinking = {} if self.thinking is None else {"reasoning_content": self.thinking}
        return {"role": self.role, "content": "".join(parts), **thinking}


@dataclass(frozen=True)
class ToolCallTurn(Turn):
    """A reply that calls tools.

    Attributes:
        tool_calls: the calls, as chat templates read them: `{"id", "type": "function", "function": {"name",
            "arguments"}}`.
    """

    tool_calls: tuple[Record, ...] = ()

    @property
    def is_blank(self) -> bool:
        """False: a call is a reply."""
        return False

    def as_message(self, image_token: str, video_token: str | None = None) -> Record:
        """Return the turn as chat templates read it, with its calls."""
        return {**super().as_message(image_token, video_token), "tool_calls": list(self.tool_calls)}


@dataclass(frozen=True)
class ToolResultTurn(Turn):
    """The result of a call.

    Attributes:
        call_id: the `id` of the call; None: the record does not tell.
        name: the name of the function, likewise.
    """

    call_id: str | None = None
    name: str | None = None

    def as_message(self, image_token: str, video_token: str | None = None) -> Record:
        """Return the turn as chat templates read it, with its call's id and name where they are known."""
        keys = {"tool_call_id": self.call_id, "name": self.name}
        known = {key: value for key, value in keys.items() if value is not None}
        return {**super().as_message(image_token, video_token), **known}


@dataclass(frozen=True)
class Sample:
    """A conversation with its images.

    Attributes:
        id: the name that the record gives itself.
        turns: the turns, in order.
        label: what a prediction head learns: a value that JSON can hold, or a mapping from the names of heads to such
            values; None for a sample without a label.
        group: a ranking compares samples of the same group.
        references: the texts that an answer is compared with, where they are not just the last reply.
        tools: the tools that the assistant may call, in OpenAI's form, as chat templates read them.
        objects: its boxes, points and time spans, for which marks are in its texts until they are written as the
            model writes them (`coordinates.writing`).
        rejected: the conversation that a model should prefer this one to, see `records.preferences`; None: there is
            none.
    """

    id: str
    turns: tuple[Turn, ...]
    label: object = None
    group: str | None = None
    references: tuple[str, ...] = ()
    tools: tuple[Record, ...] = ()
    objects: tuple[MarkedObject, ...] = ()
    rejected: "Sample | None" = None

    def __post_init__(self):
        if (place := self._surrogate_place()) is not None:
            raise BadSample(self.id, f"{place} {HALF_PAIR}")
        media = [part for turn in self.turns for part in turn.content if not isinstance(part, str)]
        if self.rejected is not None and self.rejected.media != media:
            media += self.rejected.media
        object.__setattr__(self, "_media", media)

    def _surrogate_place(self) -> str | None:
        """Return what has half of a surrogate pair: a turn by its number, a file's name, or a field."""
        for number, turn in enumerate(self.turns, start=1):
            for part in turn.content:
                if isinstance(part, str):
                    if not part.isascii() and has_surrogate(part):
                        return f"turn {number} ({turn.role})"
                elif part.path is not None and has_surrogate(str(part.path)):
                    return f"turn {number} ({turn.role}): the name of a file"
            if has_surrogate(turn.thinking or ""):
                return f"turn {number} ({turn.role}): its thinking"
            if isinstance(turn, ToolCallTurn) and (place := find_surrogate(turn.tool_calls, "tool_calls")) is not None:
                return f"turn {number} ({turn.role}): {place}"
        if self.id.isascii() and self.label is None and self.group is None and not (self.references or self.tools):
            return None  # as nearly always
        fields = {"id": self.id, "label": self.label, "group": self.group, "references": self.references}
        fields["tools"] = self.tools
        return find_surrogate({name: value for name, value in fields.items() if value})

    @property
    def images(self) -> list[ImageRef]:
        """All images, in the order of the text."""
        return [medium for medium in self.media if isinstance(medium, ImageRef)]

    @property
    def videos(self) -> list[VideoRef]:
        """All videos, in the order of the text."""
        return [medium for medium in self.media if isinstance(medium, VideoRef)]

    @property
    def media(self) -> list[ImageRef | VideoRef]:
        """All images and videos, in the order of the text; after them those of `rejected`, where it has others."""
        return vars(self)["_media"]

    @property
    def chosen(self) -> "Sample":
        """The sample without the conversation that it is preferred to."""
        return self if self.rejected is None else replace(self, rejected=None)

    def map_sides(self, change: Callable[["Sample"], "Sample"]) -> "Sample":
        """Return the sample with both its sides changed: its conversation, and the rejected one if there is one."""
        if self.rejected is None:
            return change(self)
        return replace(change(self.chosen), rejected=change(self.rejected))

    @property
    def replies(self) -> list[Turn]:
        """The replies that are trained on, in order."""
        return [turn for turn in self.turns if turn.role == "assistant" and turn.supervised]

    @property
    def reply_problem(self) -> str | None:
        """The reason why there is no reply to learn from; None if there is one."""
        given = [turn for turn in self.turns if turn.role == "assistant"]
        if not given:
            return "no reply to train on"
        if self.replies:
            return None
        if all(turn.is_blank for turn in given):
            return "no reply to train on: its replies are blank"
        return "no reply to train on: those that are not blank have weight 0 or loss false"

    @property
    def learns_between_media(self) -> bool:
        """Whether a trained reply is after an image or video and before another one."""
        has_media = [any(not isinstance(part, str) for part in turn.content) for turn in self.turns]
        return any(
            turn.role == "assistant" and turn.supervised and any(has_media[:place]) and any(has_media[place + 1 :])
            for place, turn in enumerate(self.turns)
        )

    def without_blank_replies(self) -> "Sample":
        """Return the sample with blank replies that are not learned, only read."""
        if not any(turn.supervised and turn.is_blank for turn in self.turns):
            return self
        turns = (replace(turn, supervised=turn.supervised and not turn.is_blank) for turn in self.turns)
        return replace(self, turns=tuple(turns))

    def with_videos(self, replace_video: Callable[[VideoRef], tuple[ContentPart, ...]]) -> "Sample":
        """Return the sample with each video replaced by other parts."""
        if not self.media or not self.videos:
            return self
        turns = []
        for turn in self.turns:
            replaced = (replace_video(part) if isinstance(part, VideoRef) else (part,) for part in turn.content)
            turns.append(replace(turn, content=tuple(chain.from_iterable(replaced))))
        return replace(self, turns=tuple(turns))
