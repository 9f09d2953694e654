"""Members of records as ids: a query, its positive and its negatives, each a prompt that waits for a reply."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from vlm.data.encoding.labels import IGNORE_INDEX, Encoded
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.records.members import split_members
from vlm.data.sample import MediaSize, Sample, Turn

QUERY, DOCUMENT = "query", "document"
"""The sides of a comparison: what is searched by, and what is searched for."""


@dataclass(frozen=True)
class PairEncoder(SampleEncoder):
    """Encodes the members of records, each with the system turn of its side.

    A record has the length of its longest member, since each is a row of its own.

    Attributes:
        suffix: ids after every member, such as those of a token at which a head reads.
        query_prompt: the system turn of queries that have none of their own; empty: none.
        document_prompt: that of positives and negatives.
    """

    needs_reply: ClassVar[bool] = False

    suffix: tuple[int, ...] = ()
    query_prompt: str = ""
    document_prompt: str = ""

    @property
    def member_encoder(self) -> PromptEncoder:
        """What encodes one member of `members`."""
        return PromptEncoder(self.processor, self.longest, truncate=False, suffix=self.suffix)

    def members(self, sample: Sample) -> list[Sample]:
        """Return the query, the positive and the negatives of a record, with the system turns of their sides.

        Raises:
            BadSample: the record has no positive.
        """
        query, *documents = split_members(sample)
        return [self.with_prompt(query, QUERY), *(self.with_prompt(member, DOCUMENT) for member in documents)]

    def with_prompt(self, member: Sample, side: str) -> Sample:
        """Return a member with the system turn of its side, unless it has one of its own."""
        return add_prompt(member, self.query_prompt if side == QUERY else self.document_prompt)

    def encode(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Return the ids of the longest member of a record; nothing is supervised.

        Raises:
            BadSample: the template refuses a member or leaves nothing of it, or there is no positive.
        """
        return max(self._encode_members(sample, sizes), key=lambda encoded: len(encoded.input_ids))

    def __call__(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Return the ids of all members of a record, one after the other, for those who look at it.

        Raises:
            BadSample: as `encode`, or a member is too long.
        """
        super().__call__(sample, sizes)
        ids = [token for encoded in self._encode_members(sample, sizes) for token in encoded.input_ids]
        return Encoded(ids, [IGNORE_INDEX] * len(ids))

    def _encode_members(self, sample: Sample, sizes: Sequence[MediaSize]) -> list[Encoded]:
        encoded, start = [], 0
        for member in self.members(sample):
            own = sizes[start : start + len(member.media)] if sizes else ()
            start += len(member.media)
            encoded.append(self.member_encoder.encode(member, own))
        return encoded

    def min_length(self, encoded: Encoded) -> int:
        """Return the number of all tokens, since a member is never cut."""
        return len(encoded.input_ids)

    @property
    def fingerprint_fields(self) -> tuple[object, ...]:
        """The settings that ids depend on, besides the processor."""
        return (*super().fingerprint_fields, self.suffix, self.query_prompt, self.document_prompt)


def add_prompt(member: Sample, prompt: str) -> Sample:
    """Return a member with a system turn, unless the turn is empty or the member has one of its own."""
    if not prompt or member.turns[0].role == "system":
        return member
    return replace(member, turns=(Turn("system", (prompt,)), *member.turns))
