"""Verdicts: what a proof found, as it is shown, kept in files and refused. Imports the standard library only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

MAX_REASON = 400
"""Characters of a reason that are kept."""


class State(StrEnum):
    """What came of a proof: the property holds, it does not hold, or nothing could be found out."""

    PROVED = "proved"
    FAILED = "failed"
    NOT_MADE = "not made"


class DisprovedError(Exception):
    """Raised by a proof where the property does not hold; the message says what was found instead."""


class NotProvableError(Exception):
    """Raised by a proof that cannot be made; the message says what it lacks."""


@dataclass(frozen=True)
class Verdict:
    """What a proof found; `reason` says why it is not proved, and where it is, what it found besides."""

    state: State
    reason: str = ""

    def __str__(self) -> str:
        """Return the verdict as files have it: `proved`, `failed: …` or `not made: …`."""
        return f"{self.state}: {self.reason}" if self.reason else str(self.state)

    @classmethod
    def parse(cls, text: str) -> "Verdict":
        """Return the verdict that `str` wrote; raise ValueError if it is none."""
        state, _, reason = text.partition(": ")
        return cls(State(state), reason)


UNUSED = "no reply depends on "
"""What the reason of a proof of gradients begins with that found parameters without any."""


def describe_unused(forms: Iterable[str]) -> str:
    """Return the reason that names what the forms of parameters begin with that get no gradient; "" without any."""
    listed = ", ".join(forms)
    return f"{UNUSED}{listed}" if listed else ""


def read_unused(verdicts: "Verdicts") -> tuple[str, ...]:
    """Return what `describe_unused` was given; nothing if no proof found any."""
    found = [verdict.reason for verdict in verdicts.values() if verdict.state is State.PROVED]
    return tuple(
        form for reason in found if reason.startswith(UNUSED) for form in reason.removeprefix(UNUSED).split(", ")
    )


Verdicts = Mapping[str, Verdict]
"""The verdict of each proof, by its name."""


def shorten_reason(text: str) -> str:
    """Return a reason in one line of at most `MAX_REASON` characters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON else f"{line[: MAX_REASON - 2]} …"
