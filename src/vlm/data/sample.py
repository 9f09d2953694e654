"""The one in-memory form of a record: a `Sample` of `Turn`s, whatever file it came from. Imports nothing of `vlm`."""

from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "user", "assistant")
PLACEHOLDER = "<image>"
"""What stands for a picture in text that people write, whatever token the model has for it."""


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
class Picture:
    """An image file in a turn."""

    path: Path


@dataclass(frozen=True)
class Turn:
    """What one side says: texts and pictures in the order in which they stand."""

    role: str
    content: tuple[str | Picture, ...]

    def as_message(self, image_token: str) -> dict[str, str]:
        """The turn as chat templates read it, an image token for each picture."""
        parts = [image_token if isinstance(part, Picture) else part for part in self.content]
        return {"role": self.role, "content": "".join(parts)}


@dataclass(frozen=True)
class Sample:
    """A conversation with its pictures."""

    id: str
    turns: tuple[Turn, ...]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in the order in which they stand in the text."""
        return [part for turn in self.turns for part in turn.content if isinstance(part, Picture)]
