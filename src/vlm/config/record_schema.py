"""How thinking and videos are read: keys of `dataset` and `inference`, inherited there. Imports its sibling `rules`."""

from dataclasses import dataclass, field

from vlm.config.rules import above, choices

THINKING_MODES = ("template", "keep", "drop")


@dataclass
class FrameRate:
    """A key of every source of records."""

    fps: float | None = field(default=None, kw_only=True, metadata=above(0))
    """Frames of a video that are used for each second of it, evenly spaced: one at least, and `max_frames` at most;
    null: as many as `max_frames` allows."""


@dataclass
class ThinkingInRecords:
    """A key of `dataset`."""

    thinking: str = field(default="template", kw_only=True, metadata=choices(THINKING_MODES))
    """Thinking of replies (`reasoning_content`, or `<think>…</think>` before the text): `template`: what the chat
    template writes of it is learned; `keep`: all of it, and a record whose thinking the template drops cannot be used;
    `drop`: none."""


@dataclass
class ThinkingInAnswers:
    """A key of `inference`."""

    thinking: bool | None = field(default=None, kw_only=True)
    """Whether the model is to think before it answers, for chat templates that ask (`enable_thinking`); it is saved
    with the model. null: as the model was trained: true once it was trained on records with thinking."""
