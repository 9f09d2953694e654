"""Samples as a teacher reads them, and what its batches hold beside the student's inputs.

A teacher with another processor has ids and pixels of its own for each sample. What it says is compared at supervised
tokens, one by one, so these have to be the same ids.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.batch import Batch
from vlm.data.batching.collator import Collator
from vlm.data.dataset import BlankImageDataset, SampleDataset
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.feature_cache.store import Pack
from vlm.data.processor import SampleInputs
from vlm.data.sample import BadSample, MediaSize, Sample
from vlm.data.skipped import Skipped
from vlm.data.vision.images import read_media_sizes
from vlm.train.distillation.teacher import Teacher

TEACHER_INPUTS: Final = "teacher_inputs"
"""The key of a teacher's own inputs of a sample or a batch."""

TEACHER_ROWS: Final = "teacher_rows"
"""The key of what is kept of a teacher's logits: `(S, bytes)`, see `divergences.encode_rows`."""

TeacherItem = SampleInputs | Skipped


def supervised_ids(labels: Sequence[int]) -> list[int]:
    """Return the ids that are predicted of a sample: nothing predicts its first token."""
    return [label for label in labels[1:] if label != IGNORE_INDEX]


def match_labels(labels: Sequence[int], supervised: Sequence[int], sample_id: str) -> list[int]:
    """Return a teacher's labels with as many supervised tokens as the student has, whose replies may be cut.

    Raises:
        BadSample: they are other ids.
    """
    own = supervised_ids(labels)
    if own[: len(supervised)] != list(supervised):
        place = next((i for i, pair in enumerate(zip(own, supervised, strict=False)) if pair[0] != pair[1]), len(own))
        raise BadSample(
            sample_id,
            f"the teacher's template and tokenizer give other supervised tokens, from number {place + 1} on: ids "
            f"{own[place : place + 3]} instead of {list(supervised[place : place + 3])}",
        )
    remaining = len(supervised)
    matched = [IGNORE_INDEX]
    for label in labels[1:]:
        is_kept = label != IGNORE_INDEX and remaining > 0
        matched.append(label if is_kept else IGNORE_INDEX)
        remaining -= is_kept
    return matched


class TeacherDataset(Dataset[TeacherItem]):
    """The samples of a run as its teacher reads them, with the student's supervised tokens.

    Args:
        dataset: the run's samples, with their images.
        teacher: the teacher.
        config: `dataset` of the run.
    """

    def __init__(self, dataset: SampleDataset, teacher: Teacher, config: DatasetConfig):
        self.student = self.dataset = dataset
        self.is_own = not teacher.shares_inputs_with(dataset.processor)
        if self.is_own:
            encoder = SampleEncoder(
                teacher.processor, teacher.longest, truncate=False, supervise=config.supervise, thinking=config.thinking
            )
            self.dataset = with_encoder(dataset, encoder)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.student)

    def __getitem__(self, index: int) -> TeacherItem:
        """Return the teacher's inputs of a sample, whose supervised tokens are those of the student."""
        if not self.is_own:
            return self.student[index]
        try:
            return self.match(index, self.labels_of(index))
        except BadSample as error:
            return self._skipped(error, index)

    def match(self, index: int, labels: Sequence[int]) -> TeacherItem:
        """Return the teacher's inputs of a sample that has these labels for the student."""
        item = self.dataset[index]
        if isinstance(item, Skipped):
            return item
        try:
            matched = match_labels(item["labels"], supervised_ids(labels), item["sample_ref"].id)
        except BadSample as error:
            return self._skipped(error, index)
        return {**item, "labels": matched}

    def labels_of(self, index: int) -> list[int]:
        """Return the student's labels of a sample; no image is decoded.

        Raises:
            BadSample: it cannot be used.
        """
        return encode_labels(self.student, index)

    def check(self, num_samples: int | None) -> None:
        """Check the supervised tokens of the first samples; None: of all. No image is decoded.

        Raises:
            ValueError: they are other ids for the teacher.
        """
        if not self.is_own:
            return
        for index in range(len(self) if num_samples is None else min(num_samples, len(self))):
            try:
                labels = supervised_ids(self.labels_of(index))
                match_labels(encode_labels(self.dataset, index), labels, self.student.sample(index).id)
            except BadSample as error:
                raise ValueError(re.sub(r" dataset\..*", "", str(self._skipped(error, index).as_error()))) from error

    def _skipped(self, error: BadSample, index: int) -> Skipped:
        source, record = self.student.places[index].tolist()
        return Skipped.from_error(error, self.student.sources[source], record)


def encode_labels(dataset: SampleDataset, index: int) -> list[int]:
    """Return the labels of a sample; no image is decoded.

    Raises:
        BadSample: it cannot be used.
    """
    encoder = dataset.encoder_of(index)
    return list(dataset.encoded(index, read_media_sizes(dataset.sample(index), encoder.processor)).labels)


def with_encoder(dataset: SampleDataset, encoder: SampleEncoder) -> SampleDataset:
    """Return the same samples, encoded by another encoder; their lengths are those of before."""
    sources = [replace(source, encoder=encoder) for source in dataset.sources]
    return SampleDataset(sources, dataset.places, dataset.lengths, dataset.num_images, has_videos=dataset.has_videos)


class DistilledDataset(SampleDataset):
    """The samples of a run with what their teacher needs or has said.

    Args:
        dataset: the samples, perhaps with cached features in place of images.
        teacher: gives each sample's own inputs for the teacher; None: what it has said is in the packs.
        packs: rows of its logits, by source and record.
    """

    def __init__(self, dataset: SampleDataset, teacher: TeacherDataset | None, packs: Sequence[Pack] = ()):
        super().__init__(
            dataset.sources,
            dataset.places,
            dataset.lengths,
            dataset.num_images,
            has_videos=dataset.has_videos,
            has_thinking=dataset.has_thinking,
            skipped=dataset.skipped,
            contributions=dataset.contributions,
        )
        self.dataset, self.teacher, self.packs = dataset, teacher, packs

    def __getitem__(self, index: int) -> SampleInputs | Skipped:
        """Return a sample with the teacher's inputs, or with the rows of its logits."""
        item = self.dataset[index]
        if isinstance(item, Skipped):
            return item
        if self.teacher is not None:
            inputs = self.teacher.match(index, item["labels"])
            return inputs if isinstance(inputs, Skipped) else {**item, TEACHER_INPUTS: inputs}
        rows = self._read_rows(index)
        if isinstance(rows, Skipped):
            return rows
        if len(rows) != (expected := len(supervised_ids(item["labels"]))):
            raise ValueError(
                f"{len(rows)} rows of the teacher's logits are cached for a sample with {expected} supervised tokens"
            )
        return {**item, TEACHER_ROWS: rows}

    def _read_rows(self, index: int) -> Tensor | Skipped:
        key = self.places[index].astype("uint64").tobytes()
        pack, found = next((pack, item) for pack in self.packs if (item := pack.find(key)) is not None)
        return pack.skipped[found] if found in pack.skipped else pack.read(found)[:, 0]

    def media_inputs(self, sample: Sample) -> tuple[Sequence[MediaSize], dict[str, Tensor]]:
        """Return what `dataset` does."""
        return self.dataset.media_inputs(sample)

    def blank(self) -> BlankImageDataset:
        """Return the samples with blank images, without a teacher."""
        return self.dataset.blank()


@dataclass(eq=False, repr=False)
class DistillationCollator(Collator):
    """A collator that lays out what samples have of a teacher, beside the student's batch.

    Attributes:
        teacher: makes the teacher's batches; None: it has no inputs of its own.
    """

    teacher: Collator | None = None

    @classmethod
    def around(cls, collate: Collator, teacher: Collator | None) -> "DistillationCollator":
        """Return a collator that does what another one does besides."""
        return cls(**{field.name: getattr(collate, field.name) for field in fields(collate)}, teacher=teacher)

    def __call__(self, samples: Sequence[SampleInputs | Skipped]) -> Batch:
        """Collate samples; the rows of the teacher's logits are those of all supervised positions, in their order."""
        items = [item if isinstance(item, Skipped) else dict(item) for item in samples]
        kept = [item for item in items if not isinstance(item, Skipped)]
        rows = [item.pop(TEACHER_ROWS) for item in kept if TEACHER_ROWS in item]
        inputs = [item.pop(TEACHER_INPUTS) for item in kept if TEACHER_INPUTS in item]
        batch = cast("dict[str, object]", super().__call__(items))
        if rows:
            batch[TEACHER_ROWS] = torch.cat(rows)
        if inputs:
            assert self.teacher is not None
            batch[TEACHER_INPUTS] = _tensors_of(self.teacher(inputs))
        return cast(Batch, batch)


def _tensors_of(batch: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
