"""Splits conversations that are too long into several samples: `dataset.over_length=split`.

A conversation is cut in front of questions. Each trained reply is in exactly one part, with what is before
it there: the system turn, and the turns that fit before it, whose replies are only read. A question without an image
always keeps the turns with the images that were shown last before it. So a part never asks about images that it does
not have, and a turn that stays keeps its images.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from vlm.data.cache import create_once, json_digest
from vlm.data.sample import BadSample, Sample, Turn
from vlm.data.sources import Source
from vlm.data.token_counts import Counts, count
from vlm.data.vision.images import read_media_sizes

Fits = Callable[[Sample], bool]
"""Whether a sample is short enough."""


@dataclass(frozen=True)
class Part:
    """A part of a conversation.

    Attributes:
        turns: the indices of its turns in the conversation, ascending.
        first: the index of the first turn of which replies are trained on.
        number: which part it is, from 1.
    """

    turns: tuple[int, ...]
    first: int
    number: int

    def of(self, sample: Sample) -> Sample:
        """Return the part of a conversation as a sample; texts that an answer is compared with are of the last reply.

        Boxes are written in the texts by then, and are read off these where answers are measured.
        """
        turns = tuple(
            replace(turn, supervised=False) if turn.role == "assistant" and index < self.first else turn
            for index, turn in ((index, sample.turns[index]) for index in self.turns)
        )
        references = sample.references if self.turns[-1] == len(sample.turns) - 1 else ()
        return replace(sample, id=f"{sample.id}, part {self.number}", turns=turns, references=references, objects=())


def split(sample: Sample, fits: Fits) -> list[Part] | None:
    """Return the parts of a conversation, each as long as fits; None if a reply fits in none.

    Raises:
        BadSample: the template or the processor refuses a part.
    """
    num_leading = next((index for index, turn in enumerate(sample.turns) if turn.role != "system"), 0)
    conversation = _Conversation(sample, num_leading, _group_turns(sample.turns, num_leading), fits)
    parts: list[Part] = []
    start = 0
    while start < len(conversation.groups):
        end = conversation.find_end(start)
        if end == start:
            return None
        earliest = conversation.find_earliest(start, end)
        parts.append(conversation.make_part(earliest, start, end, len(parts) + 1))
        start = end
    return parts


@dataclass(frozen=True)
class _Conversation:
    """A conversation in groups of turns, see `_group_turns`, after `num_leading` system turns."""

    sample: Sample
    num_leading: int
    groups: Sequence[range]
    fits: Fits

    def make_part(self, earliest: int, start: int, end: int, number: int = 0) -> Part:
        """Make the part that learns the groups from `start` to `end`, and reads those from `earliest` on."""
        read = sorted({*_last_shown(self.sample, self.groups, start), *range(earliest, start)})
        turns = [index for group in (*read, *range(start, end)) for index in self.groups[group]]
        return Part((*range(self.num_leading), *turns), self.groups[start][0], number)

    def find_end(self, start: int) -> int:
        """Return the group after the last one that fits into a part beginning at `start`; `start` if none fits."""
        ends = range(start + 1, len(self.groups) + 1)
        return start + bisect_left(ends, True, key=lambda end: not self._holds(start, start, end))

    def find_earliest(self, start: int, end: int) -> int:
        """Return the first of the groups before a part that still fit into it; `start` if none does."""
        counts = range(1, start + 1)
        return start - bisect_left(counts, True, key=lambda count: not self._holds(start - count, start, end))

    def _holds(self, earliest: int, start: int, end: int) -> bool:
        return self.fits(self.make_part(earliest, start, end).of(self.sample))


def _group_turns(turns: Sequence[Turn], start: int) -> list[range]:
    """Return the indices of turns in groups that begin with a question and have a reply that is trained on.

    Turns after the last trained reply are left out.
    """
    groups: list[range] = []
    begin, has_reply, asks = start, False, True
    for index in range(start, len(turns)):
        if turns[index].role == "user" and has_reply and not asks:
            groups.append(range(begin, index))
            begin, has_reply = index, False
        asks = turns[index].role == "user"
        has_reply |= turns[index].role == "assistant" and turns[index].supervised
    return [*groups, range(begin, len(turns))] if has_reply else groups


def _last_shown(sample: Sample, groups: Sequence[range], number: int) -> list[int]:
    """Return the number of the last group before this one that has images, where this one begins without any."""

    def shows(indices: Sequence[int]) -> bool:
        """Return whether any of some turns has an image or video."""
        return any(not isinstance(part, str) for index in indices for part in sample.turns[index].content)

    if shows(groups[number][:1]):
        return []
    return next(([earlier] for earlier in range(number - 1, -1, -1) if shows(groups[earlier])), [])


def add_parts(source: Source, counts: Counts, workers: int | None) -> tuple[Counts, np.ndarray]:
    """Split the records of a source that are too long, and count the parts.

    Returns:
        The counts of all records and, after them, of the parts; and the places in `counts` of records that were split.
    """
    places = np.flatnonzero(counts.length > source.encoder.longest)
    numbers = split_records(source, counts.record[places]) if len(places) else np.empty(0, np.int64)
    if not len(numbers):
        return counts, numbers
    whole = np.unique([source.record_of(number) for number in numbers.tolist()])
    parts = count(source, numbers, 0, workers)  # their images were decoded with their records
    return counts.join(parts), places[np.isin(counts.record[places], whole)]


def split_records(source: Source, records: np.ndarray) -> np.ndarray:
    """Split records of a source that are too long; the source reads the parts as further records from then on.

    Args:
        source: the source.
        records: the numbers of the records, ascending.

    Returns:
        The numbers of the parts, in order; none of a record that cannot be split.
    """
    key = json_digest(source.fingerprint, source.encoder.longest, "parts", records.tolist())
    file = create_once(source.cache / "parts" / f"{key}.json", partial(_write_parts, source, records))
    numbers = []
    for record, parts in json.loads(file.read_text(encoding="ascii")):
        for turns, first, number in parts:
            numbers.append(source.add_part(record, Part(tuple(turns), first, number)))
    return np.array(numbers, dtype=np.int64)


def _write_parts(source: Source, records: np.ndarray, path: Path) -> None:
    """Write the parts of each record."""

    def fits(sample: Sample) -> bool:
        """Return whether a sample has at most as many tokens as the encoder allows."""
        encoded = source.encoder.encode(sample, read_media_sizes(sample, source.encoder.processor))
        return len(encoded.input_ids) <= source.encoder.longest

    found: list[tuple[int, list[tuple[tuple[int, ...], int, int]]]] = []
    for record in records.tolist():
        try:
            parts = split(source.sample(record), fits) or []
        except BadSample:
            parts = []
        found.append((record, [(part.turns, part.first, part.number) for part in parts]))
    path.write_text(json.dumps(found), encoding="ascii")
