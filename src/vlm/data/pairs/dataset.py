"""Records for embeddings: a data set of records for training, and one of distinct members for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from vlm.data.batching.batch import BatchInputs, HeadBatch
from vlm.data.batching.collator import SAMPLE_REFS, SKIPPED_KEY, Collator
from vlm.data.blank_images import make_blank_medium
from vlm.data.dataset import SampleDataset, SampleRef, encode_sample, model_inputs
from vlm.data.pairs.encoder import PairEncoder
from vlm.data.processor import SampleInputs
from vlm.data.records.members import member_key
from vlm.data.sample import BadSample, Sample
from vlm.data.skipped import Skipped
from vlm.data.sources import Source
from vlm.data.vision.images import read_media_sizes
from vlm.models.contrastive import NEGATIVE, NO_ROLE, POSITIVE, QUERY


class PairItem(TypedDict):
    """A record as `PairDataset` gives it.

    Attributes:
        members: the inputs of the query, the positive and the negatives.
        keys: a number for each, equal for equal contents.
        ref: names the record.
    """

    members: list[SampleInputs]
    keys: list[int]
    ref: SampleRef


class PairDataset(Dataset[PairItem | Skipped]):
    """Records with their members.

    Attributes:
        dataset: the records.
        lengths: `(records,)`: tokens of the longest member of each.
        num_images: `(records,)`: images and videos of all its members.

    Raises:
        TypeError: the records are not encoded by a `PairEncoder`.
    """

    def __init__(self, dataset: SampleDataset):
        self.dataset, self.lengths, self.num_images = dataset, dataset.lengths, dataset.num_images
        for source in dataset.sources:
            if not isinstance(source.encoder, PairEncoder):
                raise TypeError(f"{type(source.encoder).__name__} encodes no members")

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> PairItem | Skipped:
        """Return a record's members, encoded, or `Skipped` for a record that turns out to be unusable."""
        number, record = self.dataset.places[index].tolist()
        source = self.dataset.sources[number]
        try:
            members = self.members(index)
            inputs = [encode_sample(self._member_source(number), member) for member in members]
        except BadSample as error:
            return Skipped.from_error(error, source, record)
        ref = SampleRef(source.shown_path, record, members[0].id)
        return {"members": inputs, "keys": list(map(member_key, members)), "ref": ref}

    def members(self, index: int) -> list[Sample]:
        """Return the query, the positive and the negatives of a record.

        Raises:
            BadSample: the record cannot be used any more.
        """
        source = self.dataset.sources[int(self.dataset.places[index, 0])]
        return cast(PairEncoder, source.encoder).members(self.dataset.sample(index))

    def encode_member(self, index: int, member: Sample, *, blank: bool = False) -> SampleInputs:
        """Return the inputs of a member of a record; with `blank`, its images in the processor's mean colour."""
        number = int(self.dataset.places[index, 0])
        source = self._member_source(number)
        if not blank or not member.media:
            return encode_sample(source, member)
        processor = self.dataset.processor
        sizes = read_media_sizes(member, processor)
        media = [make_blank_medium(processor, size) for size in sizes or [None] * len(member.media)]
        return model_inputs(processor, source.encoder(member, sizes), media, sizes, member)

    def _member_source(self, number: int) -> Source:
        source = self.dataset.sources[number]
        return replace(source, encoder=cast(PairEncoder, source.encoder).member_encoder)


@dataclass(frozen=True)
class Members:
    """The distinct members of the records of a data set, and which of them belong together.

    Attributes:
        places: `(M, 2)`: the record and the number in it of each distinct member's first occurrence.
        queries: `(records,)`: the place of each record's query.
        positives: `(records,)`: that of its positive.
        documents: the places of all positives and negatives, each once.
    """

    places: np.ndarray
    queries: np.ndarray
    positives: np.ndarray
    documents: np.ndarray


def find_members(dataset: PairDataset) -> Members:
    """Return the distinct members of all records; a query and a document are distinct even if their contents are equal.

    Raises:
        BadSample: a record cannot be used any more.
    """
    numbers: dict[tuple[bool, int], int] = {}
    places: list[tuple[int, int]] = []
    rows: list[list[int]] = []
    for index in range(len(dataset)):
        row = []
        for number, member in enumerate(dataset.members(index)):
            key = (number == 0, member_key(member))
            if key not in numbers:
                numbers[key] = len(places)
                places.append((index, number))
            row.append(numbers[key])
        rows.append(row)
    documents = [number for (is_query, _), number in numbers.items() if not is_query]
    return Members(
        np.array(places), np.array([row[0] for row in rows]), np.array([row[1] for row in rows]), np.array(documents)
    )


class MemberDataset(Dataset[SampleInputs | Skipped]):
    """The distinct members of the records of a data set, one a row; with `blank`, all images blank."""

    def __init__(self, dataset: PairDataset, members: Members, *, blank: bool = False):
        self.dataset, self.places, self.blank = dataset, members.places, blank

    def __len__(self) -> int:
        """Return the number of distinct members."""
        return len(self.places)

    def __getitem__(self, index: int) -> SampleInputs | Skipped:
        """Return a member's inputs, or why its record cannot be used."""
        record, number = self.places[index].tolist()
        try:
            member = self.dataset.members(record)[number]
            return self.dataset.encode_member(record, member, blank=self.blank)
        except BadSample as error:
            source, place = self.dataset.dataset.places[record].tolist()
            return Skipped.from_error(error, self.dataset.dataset.sources[source], place)


@dataclass(frozen=True, eq=False)
class PairCollator:
    """Makes batches of `PairDataset` items: a row for each member, queries first, then positives, then negatives.

    Of `MemberDataset` items it makes batches without labels, a row for each.
    """

    collate: Collator
    head: str

    def __call__(self, items: Sequence[PairItem | SampleInputs | Skipped]) -> BatchInputs:
        """Return a batch with `labels` (head -> the role of each row, float32) and `groups` (int64, keys of contents).

        Both are `(rows,)`; see `models.contrastive`. A row without a record has NaN for its role.
        """
        kept = [item for item in items if not isinstance(item, Skipped)]
        if kept and "members" not in kept[0]:
            prompts = self.collate([item if isinstance(item, Skipped) else cast(SampleInputs, item) for item in items])
            return cast(BatchInputs, {name: value for name, value in prompts.items() if name != "labels"})
        records = cast(list[PairItem], kept)
        members: list[tuple[int, SampleInputs, int]] = []
        for role, own in ((QUERY, slice(0, 1)), (POSITIVE, slice(1, 2)), (NEGATIVE, slice(2, None))):
            for item in records:
                pairs = zip(item["members"][own], item["keys"][own], strict=True)
                members += [(role, inputs, key) for inputs, key in pairs]
        batch: SampleInputs = {**self.collate([inputs for _, inputs, _ in members])}
        roles = [float(role) for role, _, _ in members] or [float("nan")]
        batch["labels"] = {self.head: torch.tensor(roles, dtype=torch.float32)}
        batch["groups"] = torch.tensor([key for _, _, key in members] or [NO_ROLE], dtype=torch.int64)
        batch[SAMPLE_REFS] = [item["ref"] for item in records]
        if skipped := [item for item in items if isinstance(item, Skipped)]:
            batch[SKIPPED_KEY] = skipped
        return cast(HeadBatch, batch)
