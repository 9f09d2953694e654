"""Thinking in replies: where records have it, and where chat templates read it. Imports siblings and `sample` only."""

import re
from collections.abc import Sequence
from dataclasses import replace

from vlm.data.encoding.markers import THINKING_END
from vlm.data.sample import Sample, Turn

THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
"""Thinking at the beginning of a reply's text."""
THINKING_KEY = "reasoning_content"
"""The key of a message from which templates read thinking; other templates expect it in the text."""


def has_thinking(turn: Turn) -> bool:
    """Return whether a reply has thinking, separately or at the beginning of its text."""
    if turn.role != "assistant":
        return False
    return bool(turn.thinking) or THINKING.match(_leading_text(turn)) is not None


def _leading_text(turn: Turn) -> str:
    return turn.content[0] if turn.content and isinstance(turn.content[0], str) else ""


def find_thinking(turn: Turn) -> str:
    """Return the thinking of a reply, without white space at its ends; empty if it has none."""
    match = THINKING.match(_leading_text(turn)) if turn.role == "assistant" else None
    return (turn.thinking or (match[1] if match else "")).strip()


def is_thinking_asked(turns: Sequence[Turn]) -> bool:
    """Return whether a reply after the last question has thinking: what templates call `enable_thinking`."""
    last = max((place for place, turn in enumerate(turns) if turn.role == "user"), default=-1)
    return any(map(find_thinking, turns[last + 1 :]))


def drop_thinking(sample: Sample) -> Sample:
    """Return a sample without the thinking of its replies."""
    if not any(map(has_thinking, sample.turns)):
        return sample
    turns = tuple(_without_thinking(turn) if has_thinking(turn) else turn for turn in sample.turns)
    return replace(sample, turns=turns).without_blank_replies()


def _without_thinking(turn: Turn) -> Turn:
    text = THINKING.sub("", _leading_text(turn), count=1)
    return replace(turn, thinking=None, content=(text, *turn.content[1:]))


def without_thinking(text: str) -> str:
    """Return an answer without the thinking before it; empty if it ends within its thinking."""
    if THINKING_END in text:
        return text.rpartition(THINKING_END)[2].strip()
    return "" if text.lstrip().startswith("<think>") else text


def place_thinking(turns: Sequence[Turn], template: str) -> list[Turn]:
    """Return turns with thinking where the template reads it: separately, or at the beginning of the text."""
    if THINKING_KEY in template:
        return [_split_thinking(turn) for turn in turns]
    return [_join_thinking(turn) for turn in turns]


def _split_thinking(turn: Turn) -> Turn:
    match = None if turn.role != "assistant" or turn.thinking else THINKING.match(_leading_text(turn))
    if match is None:
        return turn
    rest = _leading_text(turn)[match.end(1) + len(THINKING_END) :].lstrip("\n")
    return replace(turn, thinking=match[1].strip("\n"), content=(rest, *turn.content[1:]))


def _join_thinking(turn: Turn) -> Turn:
    if not turn.thinking:
        return replace(turn, thinking=None) if turn.thinking is not None else turn
    text, is_text = _leading_text(turn), bool(turn.content) and isinstance(turn.content[0], str)
    whole = f"<think>\n{turn.thinking.strip()}\n{THINKING_END}\n\n{text}"
    return replace(turn, thinking=None, content=(whole, *turn.content[is_text:]))
