"""Encodes both sides of a preference: the chosen and the rejected conversation, each with its own labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

from vlm.data.encoding.labels import Encoded
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, MediaSize, Sample

CHOSEN, REJECTED, MISMATCHED = 0, 1, 2
"""Roles of a row: a wanted reply, an unwanted reply, or the reply of another record."""
SIDE_NAMES = ("chosen", "rejected")
"""Role of a side -> its name."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class PreferenceEncoder(SampleEncoder):
    """Encodes the sides of records, each as a row of its own.

    The length of a record is that of its longer side.

    Attributes:
        labelled: whether each reply is wanted or unwanted on its own: a record has a label, or counts as two replies.
        rejects_image: whether the rejected side has other images, so that it needs no reply of its own.
    """

    needs_reply: ClassVar[bool] = False  # each side is asked

    labelled: bool = False
    rejects_image: bool = False

    def sides(self, sample: Sample) -> list[tuple[int, Sample]]:
        """Return the conversations of a record, each with its role.

        Raises:
            BadSample: one is missing.
        """
        if sample.rejected is not None:
            return [(CHOSEN, sample.chosen), (REJECTED, sample.rejected)]
        if self.labelled:
            if not isinstance(sample.label, bool):
                problem = "it has neither a rejected reply nor a label; `label` is needed, true or false"
                raise BadSample(sample.id, problem)
            return [(CHOSEN if sample.label else REJECTED, sample)]
        if sample.label is not None:
            problem = "it has a label instead of a rejected reply; trainer.preference.loss=kto reads labels"
            raise BadSample(sample.id, problem)
        if self.rejects_image and sample.media:
            return [(CHOSEN, sample), (REJECTED, sample)]
        raise BadSample(sample.id, "it has no rejected reply; dataset.format=preference reads records that have one")

    def encode_side(self, side: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Return the ids and labels of one conversation of `sides`; `sizes` of its own images.

        Raises:
            BadSample: it cannot be used, or is too long.
        """
        return self._side_encoder(side, sizes)

    def encode_sides(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> list[tuple[int, Encoded]]:
        """Return the ids and labels of each side, with its role; `sizes` of the media of the sample.

        Raises:
            BadSample: a side cannot be used, or is too long.
        """
        return [(role, self.encode_side(side, own)) for role, side, own in self._with_sizes(sample, sizes)]

    def encode(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Return the ids and labels of the longest side of a record, without a limit of length.

        Raises:
            BadSample: a side cannot be used.
        """
        encoded = [self._side_encoder.encode(side, own) for _, side, own in self._with_sizes(sample, sizes)]
        return max(encoded, key=lambda side: len(side.input_ids))

    def min_length(self, encoded: Encoded) -> int:
        """Return the number of all tokens, since a side is never cut."""
        return len(encoded.input_ids)

    @cached_property
    def _side_encoder(self) -> SampleEncoder:
        """The encoder of one conversation."""
        return SampleEncoder(
            self.processor, self.longest, truncate=False, supervise=self.supervise, thinking=self.thinking
        )

    def _with_sizes(self, sample: Sample, sizes: Sequence[MediaSize]) -> list[tuple[int, Sample, Sequence[MediaSize]]]:
        """Return the sides, each with the sizes of its own media."""
        return [(role, side, split_media(sample, role, sizes)) for role, side in self.sides(sample)]

    @property
    def fingerprint_fields(self) -> tuple[object, ...]:
        """The settings that ids depend on, in addition to the processor."""
        return (*super().fingerprint_fields, self.labelled, self.rejects_image)


def has_own_media(sample: Sample) -> bool:
    """Return whether the rejected side of a record has other images or videos than the chosen one."""
    return sample.rejected is not None and sample.rejected.media != sample.chosen.media


def split_media(sample: Sample, role: int, items: Sequence[Item]) -> Sequence[Item]:
    """Return the items of one side from a list with one item for each of `Sample.media`, or from an empty list."""
    if not has_own_media(sample):
        return items
    number = len(sample.chosen.media)
    return items[number:] if role == REJECTED else items[:number]
